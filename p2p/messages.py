"""The messages of gossip nodes, with every field checked on arrival. Knows no transport."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core_training.foundation.bounded_reading import first_error
from core_training.foundation.errors import ProtocolError
from strategies.fedavg import MOST_PROCESSES
from strategies.messages import SITE_NAME, Digest, Round, RoundOrStart, RunId, Version

Count = Annotated[int, Field(ge=0, le=2**31)]
Bytes = Annotated[int, Field(ge=0, le=2**48)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=SITE_NAME)]
Offer = tuple[int, int, str]
NoDigestYet = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


_MOST_MEMBERS = 10_000


class PeerMessage(BaseModel):
    """A message between peers: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Self:
        """Check what arrived. Raises ProtocolError that names the field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ProtocolError(f"{cls.__name__}: {first_error(error)}") from None


class Hello(PeerMessage):
    """A node's name, its run and its progress. Both sides of a greeting send one."""

    run_id: RunId
    sender: Name
    version: Version
    recipe_digest: Digest
    manifest_digest: Digest
    initial_digest: Digest

    committed: RoundOrStart
    """Last round it has committed; 0 before the first."""
    contributors: Annotated[list[Name], Field(max_length=_MOST_MEMBERS)]
    """Senders of that state's updates."""
    state_digest: NoDigestYet
    working: RoundOrStart
    """The round it is training or averaging; 0 when it is at none."""
    working_seconds: Seconds
    """The seconds since it began it."""
    round_seconds: Seconds
    """Its rounds' median seconds; 0 before any."""
    catching_up: bool
    """Whether it sits out until it can begin a round together with the others: they do not wait for it."""
    finished: bool
    """Whether its state will not change any more."""
    void_rounds: RoundOrStart = 0
    """The rounds on the way to its last commit that changed nothing."""
    train_examples: Count = 0
    """The records that it trains on; with its processes they bound what one of its updates can weigh."""
    processes: Annotated[int, Field(ge=0, le=MOST_PROCESSES)] = 0
    """The processes that it trains in."""

    @model_validator(mode="after")
    def _check_commit(self) -> Self:
        if bool(self.committed) != bool(self.state_digest):
            raise ValueError("a digest of its state goes with a committed round, and with no other")
        if self.void_rounds > self.committed:
            raise ValueError(f"{self.void_rounds} void rounds of {self.committed}")
        return self

    def difference_from(self, other: Hello) -> str | None:
        """The reason these two nodes cannot train together, in words; None when they can."""
        for field, what in _MUST_AGREE.items():
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{what}: '{other.sender}' has {theirs[:_SHOWN]}, '{self.sender}' has {mine[:_SHOWN]}"
        return None

    @property
    def offer(self) -> Offer:
        """A key that sorts states by worth: the newest, then the most updates, then any fixed order."""
        return (self.committed, len(self.contributors), self.state_digest)


_SHOWN = 16
_MUST_AGREE = {
    "version": "another version of fedloom",
    "recipe_digest": "another recipe (stage, tuning, training, topology, aggregation or privacy)",
    "manifest_digest": "other trainable tensors (another base model or tuning)",
    "initial_digest": "another start (weights, configuration or generation settings of the base model, tokenizer, chat "
    "template, earlier runs, reward model or seed; the workers' logs say which part)",
    "run_id": "another run (the recipe, the roster or the name of the run differs)",
}


class UpdateHeader(PeerMessage):
    """The head of an update, before its chunks: sender, round, and what the chunks must add up to."""

    run_id: RunId
    round: Round
    sender: Name
    manifest_digest: Digest
    weight: float
    """The update's weight in a mean: see `strategies.weights`."""
    degree: Count
    """The number of the sender's live partners in this round."""
    size: Bytes
    """Bytes of all chunks together."""
    sha256: Digest
    """Their digest."""
    wants_to_stop: bool = False
    """Whether the sender has lost the patience of `topology.early_stopping_patience`."""


class Receipt(PeerMessage):
    """Answer to an update that was in order: whether it will be averaged, or came too late (or too early)."""

    accepted: bool
    committed: RoundOrStart
    """Last round that the receiver has committed."""


GroupPhase = Literal["here", "keys", "scatter", "ready", "open", "gather", "confirm", "gave up"]
"""A group message's kind: a phase of `security.secure_aggregation.group`, or what comes before or in place of it."""


class GroupHeader(PeerMessage):
    """The head of a message to another member of a group, before its chunks: the attempt and phase.

    `here` says that the sender has trained and waits for a group (attempt 0, no members); `gave up` that the attempt
    has failed at the sender.
    """

    run_id: RunId
    sender: Name
    round: Round
    attempt: Count
    members: Annotated[list[Name], Field(max_length=_MOST_MEMBERS)]
    """The group, in roster order. The first of them called the group together."""
    phase: GroupPhase
    size: Bytes
    """Bytes of all chunks together."""
    sha256: Digest
    """Their digest."""


class StateRequest(PeerMessage):
    """A request for one commit's serialised state from `offset` on."""

    run_id: RunId
    sender: Name
    round: Round
    manifest_digest: Digest
    state_digest: Digest
    offset: Bytes
