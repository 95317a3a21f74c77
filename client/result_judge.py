"""A site's part in federated evaluations: judges the result of a run on the site's own data sets, and tells sums.

What the site holds to, whatever the server asks:
- it judges the result that it saved when the run ended, and no other state;
- its data sets are those of its `site.yaml`, by name; no code and no pattern comes with an order;
- to the same question it gives the same bytes, and it answers so many different ones of a run as its `site.yaml` says;
- under masks it sends one masked vector of each data set in a run, and none of one that shares a file with another;
- of a run under differential privacy it tells nothing, unless its `site.yaml` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from client.enrolment import Enrolment
from client.secure_side import SecureSide
from core_training.data.records import data_files
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import FedloomError, InputError, ProtocolError, RunError
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from evaluation.federated.site_sums import Plan, to_integers
from strategies.codec_of_round import NO_VALUES, sums_codec
from strategies.messages import HELD_OUT, MaskedSums, SecureOrder, SecureReply, SumsOrder, SumsReply

FOLDER = "evaluations"
RESULT = "result.sha256"
"""The digest of the state that a site saved as the run's result."""


@dataclass(frozen=True)
class JudgingTerms:
    """What a site lets others learn by evaluations; see `evaluation` in its `site.yaml`."""

    most: int = 8
    least_items: int = 10
    tell_own_figures: bool = False
    despite_differential_privacy: bool = False


@dataclass(frozen=True)
class Judging:
    """A site's data sets and terms; `resolve` puts its own files and models in the place of a recipe's names.

    `tell` is what others are told of an error met while judging, which may speak of the site's files and records.
    """

    data_sets: Mapping[str, list[str]] = field(default_factory=dict)
    terms: JudgingTerms = field(default_factory=JudgingTerms)
    resolve: Callable[[Recipe], Recipe] = lambda recipe: recipe
    tell: Callable[[FedloomError], str] = str


class _Asked(BaseModel):
    """An evaluation that was asked for, on disk before anything is told."""

    model_config = ConfigDict(extra="forbid", strict=True)

    order: dict[str, object]
    files: list[str]
    tells_own: bool
    numbers: list[int] | None = None


class ResultJudge:
    """The evaluations of one run at one site."""

    def __init__(
        self, name: str, enrolment: Enrolment, judging: Judging, run: RunFolder, make_room: Callable[[], None]
    ) -> None:
        """`make_room` frees what the run's engine holds. Raise ProtocolError for a run that was not joined here."""
        recipe = run.path / "recipe.yaml"
        if not recipe.exists():
            raise ProtocolError(f"this site has not joined run {run.path.name}", fatal=True)
        self._name = name
        self._enrolment = enrolment
        self._judging = judging
        self._run = run
        self._make_room = make_room
        self._recipe_text = recipe.read_text(encoding="utf-8")
        self._recipe = parse_recipe(self._recipe_text, source="the run's recipe")

    def answer(self, order: SumsOrder) -> SumsReply | MaskedSums:
        """The site's sums, or, where the run is masked, that it is ready, and then its masked vector.

        Raises InputError for what this site does not tell.
        """
        asked = self._asked(order)
        assert asked.numbers is not None, "they were computed"
        if self._recipe.privacy.secure is None:
            if order.masking is not None:
                raise ProtocolError("the order would have sums masked; this run does not aggregate securely")
            payload = np.array(asked.numbers, dtype="<i8").tobytes()
            return SumsReply(run_id=order.run_id, key=order.key, tells_own=asked.tells_own, payload=payload)
        side = self._secure_side(order.run_id, order.key)
        if order.masking is None:
            # Never its own figures: taken off a sum, they would tell of those who tell nothing.
            return SumsReply(run_id=order.run_id, key=order.key, tells_own=False, roster_digest=side.roster_digest)
        if order.sites > side.most_sites:
            raise ProtocolError(
                f"the order leaves room for {order.sites} sites; this site's roster has {side.most_sites}"
            )
        codec = sums_codec(self._recipe, len(asked.numbers), order.sites)
        vector = codec.encode(NO_VALUES, NO_VALUES, 1, asked.numbers, b"")
        # One round, so that no site is ever in two sums of one question.
        statement = side.mask(1, order.masking, order.context(self._recipe_text), vector)
        return MaskedSums(run_id=order.run_id, key=order.key, statement=statement, payload=codec.view(vector))

    def secure(self, order: SecureOrder) -> SecureReply:
        """Answer a step of the protocol for an evaluation whose sums are there. Raises ProtocolError."""
        assert order.evaluation is not None, "it is of an evaluation"
        if not self._file(order.evaluation).exists():
            raise ProtocolError("this evaluation was not asked for here")
        return self._secure_side(order.run_id, order.evaluation).answer(order)

    def _secure_side(self, run_id: str, key: str) -> SecureSide:
        """The protocol of one evaluation, with the terms of the run that it judges."""
        file = self._folder(key) / "masks.json"
        return SecureSide(self._name, self._enrolment, self._recipe, run_id, file, key)

    def _asked(self, order: SumsOrder) -> _Asked:
        """The evaluation, computed now unless it was before."""
        if self._file(order.key).exists():
            asked = _Asked.model_validate_json(self._file(order.key).read_bytes())
        else:
            asked = self._admit(order)
        if asked.numbers is None:
            # Noted before others were answered, maybe, and cut short.
            self._check_overlap(order.key, asked.files)
            figures, items = self._compute(order, asked)
            asked = asked.model_copy(update={"numbers": figures})
            self._write(order.key, asked)
            self._run.event(events.ResultJudged(data=order.data, items=items))
        return asked

    def _admit(self, order: SumsOrder) -> _Asked:
        """Note a question that was not asked before. Raises InputError where the site answers no more, or not this."""
        terms, privacy = self._judging.terms, self._recipe.privacy.differential_privacy
        if privacy is not None and not privacy.tell_losses and not terms.despite_differential_privacy:
            raise InputError(
                "privacy.differential_privacy: figures of a result on single records are covered by no ε, so this site "
                "tells none (evaluation.despite_differential_privacy in its site.yaml)"
            )
        self._plan(order)
        self._check_result(order)
        files = self._files(order.data)
        if (earlier := len(self._kept())) >= terms.most:
            raise InputError(
                f"evaluation.most: this site answers {terms.most} different evaluations of a run, and has answered "
                f"{earlier}"
            )
        self._check_overlap(order.key, files)
        asked = _Asked(order=order.model_dump(mode="json"), files=files, tells_own=terms.tell_own_figures)
        self._write(order.key, asked)
        return asked

    def _check_overlap(self, key: str, files: list[str]) -> None:
        """Raise InputError where a sum is masked, and another question about one of these files has its numbers."""
        if self._recipe.privacy.secure is None:
            return
        for file in self._kept():
            other = _Asked.model_validate_json(file.read_bytes())
            if file != self._file(key) and other.numbers is not None and set(files) & set(other.files):
                raise InputError(
                    "this run aggregates securely, and these records were judged in it before "
                    f"(as '{other.order['data']}'): of two sums with other sites in them one site's could be told"
                )

    def _compute(self, order: SumsOrder, asked: _Asked) -> tuple[list[int], int]:
        from evaluation.federated.at_a_site import AtSite, judged

        self._make_room()
        plan, secret = self._plan(order), self._enrolment.rounding_secret
        seed = hashlib.sha256(f"resamples\n{secret}\n{order.run_id}\n{order.key}".encode()).digest()
        at = AtSite(self._run.path, self._judging.resolve(self._recipe), order.data, tuple(asked.files))
        try:
            figures = judged(at, plan, order.max_tokens, seed, self._judging.terms.least_items, self._folder(order.key))
        except FedloomError as error:
            if isinstance(error, RunError) and error.process_is_lost:
                raise
            kind = InputError if isinstance(error, InputError) else ProtocolError
            raise kind(self._judging.tell(error)) from error
        return to_integers(plan, figures), figures.items

    def _plan(self, order: SumsOrder) -> Plan:
        own = self._recipe.topology.own_steps is not None
        return Plan(tuple(order.metrics), tuple(order.labels), order.resamples, own)

    def _check_result(self, order: SumsOrder) -> None:
        saved = self._run.path / RESULT
        if not saved.exists():
            raise InputError("this site has no result of the run: it was away when the run ended")
        if saved.read_text(encoding="ascii") != order.state_digest:
            raise InputError("this site saved another result of the run, and judges no other")

    def _files(self, data: str) -> list[str]:
        if data == HELD_OUT:
            of_run = self._judging.resolve(self._recipe).data
            return [path for one in (of_run.train, of_run.eval) if one is not None for path in self._found(one)]
        if data not in self._judging.data_sets:
            known = ", ".join(f"'{name}'" for name in self._judging.data_sets) or "none"
            raise InputError(f"site '{self._name}' has no data set '{data}', it has {known}")
        return self._found(self._judging.data_sets[data])

    def _found(self, patterns: str | list[str]) -> list[str]:
        try:
            return [str(path) for path in data_files(patterns)]
        except InputError as error:
            raise InputError(self._judging.tell(error)) from error

    def _kept(self) -> list[Path]:
        return sorted((self._run.path / FOLDER).glob("*/sums.json"))

    def _folder(self, key: str) -> Path:
        return self._run.path / FOLDER / key[:32]

    def _file(self, key: str) -> Path:
        return self._folder(key) / "sums.json"

    def _write(self, key: str, asked: _Asked) -> None:
        commit_file(self._file(key), asked.model_dump_json().encode())
