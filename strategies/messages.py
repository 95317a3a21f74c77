"""The messages between parties: a kind, a few checked fields, and at most one payload of tensors.

The same messages travel in Flower's records, over the worker's socket and inside the simulation. Fields are plain JSON
values, validated on arrival; payloads are safetensors. Knows no transport.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core_training.foundation.bounded_reading import (
    MOST_YAML_BYTES,
    ForeignTextError,
    first_error,
    parse_json,
    shortened_text,
)
from core_training.foundation.errors import LONGEST, NarrowScaleError, ProtocolError
from core_training.foundation.state import Manifest
from core_training.foundation.trainable import DataReport, EvalReport, Number, Seconds, TrainReport
from core_training.parts.aggregation_rules.group_gate import MOST_GROUPS
from core_training.parts.section import MOST, MOST_ROUNDS
from strategies.fedavg import MOST_PROCESSES
from strategies.ring_scale import Scale

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RUN_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
RunId = Annotated[str, Field(pattern=RUN_ID)]
LayoutFile = Annotated[str, Field(pattern=r"^(adapter_config|buffers|config|fedloom|generation_config)\.json$")]
Round = Annotated[int, Field(ge=1, le=MOST_ROUNDS)]
RoundOrStart = Annotated[int, Field(ge=0, le=MOST_ROUNDS)]
"""A round, or 0: before the first."""
Steps = Annotated[int, Field(ge=1, le=MOST)]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+!_-]{1,40}$")]
"""A version of fedloom."""

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


@dataclass(frozen=True)
class Envelope:
    """One message in its neutral form: what a transport carries. `text` is the fields, a JSON object."""

    kind: str
    text: str
    payload: bytes | memoryview = b""

    @classmethod
    def of(cls, kind: str, fields: Mapping[str, Any], payload: bytes | memoryview = b"") -> Self:
        """An envelope with these fields."""
        return cls(kind, json.dumps(fields, separators=(",", ":")), payload)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields, not checked. Raises ProtocolError for what is no JSON object."""
        wrong = f"the fields of the '{shortened_text(self.kind, 60)}' message are not a JSON object"
        try:
            fields = parse_json(self.text)
        except ForeignTextError as error:
            raise ProtocolError(f"{wrong}: {error}") from None
        if not isinstance(fields, dict):
            raise ProtocolError(wrong)
        return fields


class Message(BaseModel):
    """A message with checked fields. `payload` (tensors, as safetensors) rides beside them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, ser_json_inf_nan="constants"
    )
    kind: ClassVar[str]
    payload: bytes | memoryview = Field(b"", exclude=True, repr=False)

    def envelope(self) -> Envelope:
        return Envelope(self.kind, self.model_dump_json(), self.payload)

    @classmethod
    def open(cls, envelope: Envelope) -> Self:
        """Check an envelope. Raises ProtocolError for another kind, and names the field that is wrong."""
        if envelope.kind == Refusal.kind and cls is not Refusal:
            refusal = Refusal.open(envelope)
            kind_of_error = NarrowScaleError if refusal.too_narrow else ProtocolError
            raise kind_of_error(refusal.reason, fatal=refusal.fatal)
        if envelope.kind != cls.kind:
            raise ProtocolError(f"a '{shortened_text(envelope.kind, 60)}' message came where '{cls.kind}' was expected")
        fields = envelope.fields
        try:
            message = cls.model_validate_json(json.dumps(fields), strict=True)
        except ValidationError as error:
            if not error.errors(include_url=False, include_input=False)[0]["loc"]:
                raise ProtocolError(f"the fields of the '{cls.kind}' message are not a JSON object") from None
            raise ProtocolError(f"{cls.kind} message: {first_error(error)}") from None
        return message.model_copy(update={"payload": envelope.payload})


class JoinOrder(Message):
    """Server to site: a run begins (or goes on); build its engine and say what you would train."""

    kind: ClassVar[str] = "join"
    run_id: RunId
    version: Version
    recipe: Annotated[str, Field(max_length=MOST_YAML_BYTES)]


class JoinReply(Message):
    """Site to server: what this site would train, so that differences show before the first round."""

    kind: ClassVar[str] = "joined"
    run_id: RunId
    version: Version
    recipe_digest: Digest
    manifest: list[list[Any]]
    """[name, shape] of each trainable tensor; see `parsed_manifest`."""
    initial_digest: Digest
    """The digest of the base model's weights and the initial trainable state."""
    initial_state_digest: Digest
    """The digest of the initial trainable state alone."""
    roster_digest: Digest | None
    """The digest of the roster that the site has pinned, where the run aggregates securely."""
    data: DataReport
    processes: Annotated[int, Field(ge=1, le=MOST_PROCESSES)] = 1
    """The processes that the site trains in; with its records they bound what it can have learned from in a round."""
    layout: dict[LayoutFile, Annotated[str, Field(max_length=2**20)]]
    """The small files that stand beside the weights of a saved result."""

    @property
    def parsed_manifest(self) -> Manifest:
        return Manifest.from_json(self.manifest)


class InitialStateOrder(Message):
    """To a site: send the state that the run begins with. It is made of public things and the recipe's seed."""

    kind: ClassVar[str] = "initial"
    run_id: RunId


class InitialStateReply(Message):
    """From a site: the initial state, in the payload."""

    kind: ClassVar[str] = "initial_state"
    run_id: RunId


class SecureOrder(Message):
    """Server to site: a step of secure aggregation besides training. The payload is the protocol's own document."""

    kind: ClassVar[str] = "secure"
    run_id: RunId
    step: Literal["keys", "shares", "unmask"]
    evaluation: Digest | None = None
    """The key of the evaluation whose sums are masked (`SumsOrder.key`); None in a round of the run."""


class SecureReply(Message):
    """Site to server: the protocol's answer, in the payload."""

    kind: ClassVar[str] = "secured"
    run_id: RunId


class RingTerms(BaseModel):
    """The terms for writing a round's update where the codec is a ring."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    scale: Scale
    sites: Annotated[int, Field(ge=1, le=100_000)]
    """The most updates that the sum has room for."""
    masking: Annotated[str, Field(max_length=4 * 2**20)] | None = None
    """The protocol's own document on how to mask; None where the sum is not secret."""


class TrainOrder(Message):
    """Server to site: train one slice from the state in the payload (round 1: from the site's initial state)."""

    kind: ClassVar[str] = "train"
    run_id: RunId
    round: Round
    steps: Steps | None
    """The optimizer steps of the slice, at most; None: those of the site's own records (`topology.local_epochs`)."""
    evaluate: bool
    manifest_digest: Digest
    void_rounds: RoundOrStart = 0
    """The rounds before it that changed nothing: the learning rate goes by those that counted."""
    taken_in: RoundOrStart | None = None
    """The last round in whose mean this site's update is, 0 for none; told where a site keeps of its rounds what must
    follow a server that was taken back (`aggregation.outer.step: feddyn`, `aggregation.adapters: fedsa`)."""
    ring: RingTerms | None = None

    @property
    def counted(self) -> int:
        """The rounds before it that counted."""
        return self.round - 1 - self.void_rounds

    def context(self, start: str, recipe: str, initial: str) -> bytes:
        """SHA-256 over all that the parties of the round must see alike.

        `start` is the digest of the state it begins with, `recipe` the run's recipe as the server wrote it, `initial`
        the run's initial digest. Sites that were told different things get masks that do not cancel.
        """
        alike = self.model_dump(mode="json", exclude={"ring": {"masking"}, "taken_in": True})
        return hashlib.sha256(json.dumps([alike, start, recipe, initial], sort_keys=True).encode()).digest()


class Update(Message):
    """Site to server: what the slice led to (payload, in the recipe's codec), its weight, and the figures of the round.

    `weight` is that in the mean: see `strategies.weights`. `evaluation` holds the losses of the state as it arrived,
    before training.
    """

    kind: ClassVar[str] = "update"
    run_id: RunId
    round: Round
    manifest_digest: Digest
    weight: Number
    train: TrainReport
    evaluation: EvalReport | None
    resident_seconds: Seconds
    """Seconds from the order's arrival at the worker to the first step of training."""
    seconds: Seconds
    """Seconds from the order's arrival at the worker to this answer."""


class MaskedUpdate(Message):
    """Site to server: the masked vector of a round (payload). Weight and figures are inside it, and so in the sum."""

    kind: ClassVar[str] = "masked"
    run_id: RunId
    round: Round
    manifest_digest: Digest
    statement: Annotated[str, Field(max_length=65536)]
    """The protocol's own document: what was masked for which slot, signed by the site."""
    resident_seconds: Seconds
    training_seconds: Seconds
    masking_seconds: Seconds
    seconds: Seconds


class VoteOrder(Message):
    """Server to site: try the states in the payload, one after the other, on the held-out records.

    They are the means of the groups of a round that the site has trained in.
    """

    kind: ClassVar[str] = "vote"
    run_id: RunId
    round: Round
    manifest_digest: Digest
    candidates: Annotated[int, Field(ge=1, le=MOST_GROUPS)]
    """The states in the payload, all of one length."""
    sites: Annotated[int, Field(ge=1, le=100_000)]
    """The most ballots that a sum has room for."""
    masking: Annotated[str, Field(max_length=4 * 2**20)] | None = None
    """The protocol's own document on how to mask; None where the sum is not secret."""

    def context(self, recipe: str, initial: str) -> bytes:
        """SHA-256 over all that those who vote together must see alike, the states among it: see `TrainOrder`."""
        alike = self.model_dump(mode="json", exclude={"masking"})
        tried = hashlib.sha256(self.payload).hexdigest()
        return hashlib.sha256(json.dumps(["vote", alike, tried, recipe, initial], sort_keys=True).encode()).digest()


Figure = Annotated[int, Field(ge=-(2**62), le=2**62)]


class Vote(Message):
    """Site to server: its ballot on the states that were sent (`strategies.group_gate.Ballot`)."""

    kind: ClassVar[str] = "voted"
    run_id: RunId
    round: Round
    manifest_digest: Digest
    ballot: Annotated[list[Figure], Field(min_length=3, max_length=2 + MOST_GROUPS)]


class MaskedVote(Message):
    """Site to server: the masked vector of a ballot (payload), and the protocol's signed statement on it."""

    kind: ClassVar[str] = "masked_vote"
    run_id: RunId
    round: Round
    manifest_digest: Digest
    statement: Annotated[str, Field(max_length=65536)]


class EvaluateOrder(Message):
    """Server to site: evaluate the state in the payload; `final` says it is the run's result, to be kept."""

    kind: ClassVar[str] = "evaluate"
    run_id: RunId
    round: RoundOrStart
    final: bool
    manifest_digest: Digest
    taken_in: RoundOrStart | None = None
    """As in a `TrainOrder`."""


class EvaluateReply(Message):
    """Site to server: losses of the state that was sent."""

    kind: ClassVar[str] = "evaluated"
    run_id: RunId
    round: RoundOrStart
    evaluation: EvalReport


HELD_OUT = "held-out"
"""In place of a data set's name: what the run held out."""


class SumsOrder(Message):
    """Server to site: judge the result of a run that has ended on the site's own data set of a name, and tell sums.

    Under masks the first order, without `masking`, has the site compute them and say that it is ready.
    """

    kind: ClassVar[str] = "sums"
    run_id: RunId
    data: Annotated[str, Field(pattern=SITE_NAME)]
    """The data set's name in the sites' `site.yaml`, or `HELD_OUT`."""
    metrics: Annotated[list[Annotated[str, Field(max_length=100)]], Field(min_length=1, max_length=32)]
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=64)]
    resamples: Annotated[int, Field(ge=0, le=2000)]
    max_tokens: Annotated[int, Field(ge=1, le=4096)]
    state_digest: Digest
    """Of the run's result: a site judges the one that it saved, and no other."""
    sites: Annotated[int, Field(ge=1, le=100_000)]
    """The most sites that a sum has room for."""
    masking: Annotated[str, Field(max_length=4 * 2**20)] | None = None

    @property
    def key(self) -> str:
        """SHA-256 (hex) over what is asked: to the same a site gives the same bytes."""
        alike = self.model_dump(mode="json", exclude={"masking", "sites"})
        return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()

    def context(self, recipe: str) -> bytes:
        """SHA-256 over all that those whose sums are added must see alike: see `TrainOrder`."""
        alike = self.model_dump(mode="json", exclude={"masking"})
        return hashlib.sha256(json.dumps(["sums", alike, recipe], sort_keys=True).encode()).digest()


def masks_of_evaluation(run_id: str, key: str) -> str:
    """The name under which the masks of an evaluation are made: another for every question."""
    return f"{run_id}/{key}"


class SumsReply(Message):
    """Site to server: its sums (payload: 64-bit whole numbers, little endian), or none yet where they are masked."""

    kind: ClassVar[str] = "summed"
    run_id: RunId
    key: Digest
    tells_own: bool
    """Whether the site's own figures may be told (its `site.yaml`)."""
    roster_digest: Digest | None = None
    """The digest of the roster that the site has pinned, where sums are masked."""


class MaskedSums(Message):
    """Site to server: the masked vector of its sums (payload), and the protocol's signed statement on it."""

    kind: ClassVar[str] = "masked_sums"
    run_id: RunId
    key: Digest
    statement: Annotated[str, Field(max_length=65536)]


class Refusal(Message):
    """Site to server: the order cannot be carried out. `fatal` says that trying again would not help.

    `too_narrow` says that the site's update does not fit the scale of the order.
    """

    kind: ClassVar[str] = "refused"
    reason: Annotated[str, Field(max_length=LONGEST)]
    fatal: bool = False
    too_narrow: bool = False
