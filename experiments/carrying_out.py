"""Carrying a pipeline out: what is unchanged is skipped, what was begun is gone on with, and gates end it.

`pipeline.json` in its folder says of each step by which digest it was begun, or done. A step counts as done when its
outcome is there and what it reads is as it was: recipe, files, base model, earlier steps' results, fedloom's version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from core_training.foundation.background import claim
from core_training.foundation.bounded_reading import ForeignTextError, read_json
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import FedloomError, InputError, Interrupted, RunError
from experiments.digests import Digester
from experiments.figures import figure
from experiments.pipeline import Pipeline, PlannedStep
from experiments.running import OnProgress

Status = Literal["done", "skipped", "failed", "planned"]


@dataclass(frozen=True)
class Verdict:
    """What a gate found: the figure's value, and the limit that it was held against.

    Of a step's own gate (`Step.judgements`) there are neither: its `text` says what was found.
    """

    figure: str
    text: str
    value: float | None
    limit: float | None
    passed: bool
    is_relative: bool = False

    @property
    def asked(self) -> str:
        """The gate for people; of one relative to another step, with what that comes to."""
        return self.text if not self.is_relative else f"{self.text}, which is {self.limit:.6g}"

    @property
    def short(self) -> str:
        """The figure, its value and the gate, for a table."""
        return self.text if self.value is None else f"{self.figure} {self.value:.4g} {self.text}"

    @property
    def finding(self) -> str:
        """What was found, and what has to be."""
        return self.text if self.value is None else f"{self.figure} is {self.value:.6g}, and has to be {self.asked}"


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step, and why. `planned` is one of a dry run that would be done."""

    name: str
    what: str
    status: Status
    run: Path
    why: str = ""
    gates: tuple[Verdict, ...] = field(default=())

    def document(self) -> dict[str, Any]:
        """The step as `pipeline --json` tells it."""
        gates = [
            {"figure": one.figure, "gate": one.text, "value": one.value, "passed": one.passed} for one in self.gates
        ]
        return {"name": self.name, "status": self.status, "run": str(self.run), "why": self.why, "gates": gates}


Watch = Callable[[PlannedStep], AbstractContextManager[OnProgress]]
"""What shows the progress of a step while it is done."""


OnFound = Callable[[object], None]
"""Given what a step found (`Step.run`), to write its page from."""


@dataclass
class Carried:
    """The outcomes so far, and what ended the pipeline before its end."""

    outcomes: list[StepOutcome] = field(default_factory=list)
    ended_by: FedloomError | None = None


def carry_out(
    pipeline: Pipeline,
    watch: Watch,
    *,
    start: str | None = None,
    only: str | None = None,
    on_found: OnFound = lambda _: None,
) -> Carried:
    """Do the steps that are not done, in order, until one fails or a gate does not pass.

    From step `start` on, all are done anew, and those before it are taken as they are; `only` does one step anew.
    What ended it is kept with the outcomes so far; Interrupted is, too. Raises InputError before the first step.
    """
    chosen = _chosen(pipeline, start, only)
    anew = start is not None or only is not None
    try:
        pipeline.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {pipeline.folder} cannot be made: {error.strerror}") from None
    carried = Carried()
    with claim(pipeline.folder / ".lock"):
        work = _Work(pipeline, watch, on_found)
        for planned in pipeline.steps if only is None else chosen:
            try:
                outcome = work.do(planned, taken=planned not in chosen, anew=anew)
                carried.ended_by = _not_passed(outcome)
            except FedloomError as error:
                step, carried.ended_by = planned.step, _told(error, planned)
                outcome = StepOutcome(step.name, step.what, "failed", step.folder, str(error))
            if carried.ended_by is not None:
                carried.outcomes.append(replace(outcome, status="failed", why=str(carried.ended_by)))
                break
            carried.outcomes.append(outcome)
        work.digester.keep()
    return carried


def plan(pipeline: Pipeline, *, start: str | None = None, only: str | None = None) -> list[StepOutcome]:
    """What `carry_out` would do, without doing it: `planned` or `skipped`, and why."""
    chosen = _chosen(pipeline, start, only)
    work, outcomes, fresh = _Work(pipeline, None), [], set[str]()
    for planned in pipeline.steps:
        if planned not in chosen and only is not None:
            continue
        status, why = "skipped", "taken as it is"
        if planned in chosen:
            status, why = "planned", "asked for" if start or only else work.why(planned, fresh)
            status = status if why else "skipped"
        if status == "planned":
            fresh.add(planned.name)
        outcome: Status = "planned" if status == "planned" else "skipped"
        outcomes.append(StepOutcome(planned.name, planned.step.what, outcome, planned.step.folder, why or _UNCHANGED))
    return outcomes


_UNCHANGED = "nothing that it reads has changed"


class _Work:
    """The steps' digests and what is written down of them."""

    def __init__(self, pipeline: Pipeline, watch: Watch | None, on_found: OnFound = lambda _: None) -> None:
        self._pipeline = pipeline
        self._watch = watch
        self._on_found = on_found
        self._file = pipeline.folder / "pipeline.json"
        self._noted = _read(self._file)
        self.digester = Digester(pipeline.folder / ".digests.json")

    def do(self, planned: PlannedStep, *, taken: bool, anew: bool) -> StepOutcome:
        """Do a step, unless it is to be taken as it is, or nothing has changed."""
        step = planned.step
        if taken:
            if not step.is_there:
                raise InputError(f"step '{step.name}' has no result in {step.folder} yet; leave --from out")
            return self._outcome(planned, "skipped", "taken as it is")
        noted, digest = self._noted.get(step.name, {}), step.digest(self.digester)
        why = _why(noted, digest, is_there=step.is_there)
        if not why and not anew:
            return self._outcome(planned, "skipped", _UNCHANGED)
        assert self._watch is not None
        with self._watch(planned) as on_progress:
            resume = not anew and noted == {"status": "begun", "digest": digest}
            self._note(step.name, "begun", digest)
            self._on_found(step.run(on_progress, resume=resume))
            self._note(step.name, "done", digest)
        return self._outcome(planned, "done", why or "asked for")

    def why(self, planned: PlannedStep, fresh: set[str]) -> str:
        """Why a step would be done, where the steps `fresh` would be before it; empty where it would not."""
        if earlier := [name for name in planned.after if name in fresh]:
            return f"step '{earlier[0]}' comes before it"
        noted = self._noted.get(planned.name, {})
        return _why(noted, planned.step.digest(self.digester), is_there=planned.step.is_there)

    def _note(self, name: str, status: str, digest: str) -> None:
        self._noted[name] = {"status": status, "digest": digest}
        commit_file(self._file, json.dumps({"steps": self._noted}, indent=2).encode())

    def _outcome(self, planned: PlannedStep, status: Status, why: str) -> StepOutcome:
        verdicts = tuple(_verdicts(planned, self._pipeline))
        return StepOutcome(planned.name, planned.step.what, status, planned.step.folder, why, verdicts)


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        document = read_json(file)
    except (OSError, ForeignTextError):
        return {}
    steps = document.get("steps") if isinstance(document, dict) else None
    return steps if isinstance(steps, dict) else {}


def _why(noted: dict[str, str], digest: str, *, is_there: bool) -> str:
    """Why a step has to be done; empty where it has not."""
    if not noted:
        return "it was never done"
    if noted.get("digest") != digest:
        return "something that it reads has changed"
    if noted.get("status") != "done":
        return "it was begun, and has not ended"
    return "" if is_there else "its result is gone"


def _chosen(pipeline: Pipeline, start: str | None, only: str | None) -> Sequence[PlannedStep]:
    if start is not None and only is not None:
        raise InputError("--from and --only: give one of them")
    if only is not None:
        chosen = pipeline.named(only, "--only")
        for name in chosen.after:
            if not (earlier := pipeline.named(name, "--only")).step.is_there:
                raise InputError(
                    f"--only: step '{only}' refers to '{name}', which has no result yet: {earlier.step.folder}"
                )
        return [chosen]
    first = 0 if start is None else pipeline.steps.index(pipeline.named(start, "--from"))
    return pipeline.steps[first:]


def _verdicts(planned: PlannedStep, pipeline: Pipeline) -> Iterator[Verdict]:
    for gate in planned.gates:
        place = f"{planned.step.place}gates.{gate.figure}"
        value = figure(planned.step.summary(), gate.figure, place)

        def of_step(name: str, name_of_figure: str = gate.figure, place: str = place) -> float:
            return figure(pipeline.named(name, place).step.summary(), name_of_figure, f"{place}: step '{name}'")

        limit = gate.limit(of_step)
        yield Verdict(gate.figure, gate.text, value, limit, gate.passes(value, limit), gate.step is not None)
    for own in planned.step.judgements():
        yield Verdict(own.gate, own.words, None, None, own.passed)


def _not_passed(outcome: StepOutcome) -> RunError | None:
    """The error that says which gates a step's figures do not pass, if any."""
    failed = [one for one in outcome.gates if not one.passed]
    if not failed:
        return None
    said = "; ".join(one.finding for one in failed)
    return RunError(f"a gate of step '{outcome.name}' did not pass: {said}; {outcome.run} is as it came out")


def _told(error: FedloomError, planned: PlannedStep) -> FedloomError:
    """The error with the step's name, and how to go on."""
    if isinstance(error, Interrupted):
        words = str(error).partition("; --resume")[0]  # that is of the run's own command
        told = Interrupted(f"step '{planned.name}': {words}; the same command goes on")
        told.exit_code = error.exit_code
        return told
    kind = InputError if isinstance(error, InputError) else RunError
    return kind(f"step '{planned.name}': {error}")
