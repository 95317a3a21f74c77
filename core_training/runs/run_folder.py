"""The run folder: what a run leaves behind, in the files that people and programs look for.

`recipe.yaml` (resolved), `events.jsonl` (append-only), `curve.jsonl`, `summary.json`, `checkpoints/`, `adapter/` or
`model/`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from core_training.foundation import background
from core_training.foundation.bounded_reading import ForeignTextError, parse_value, read_json, read_lines
from core_training.foundation.durable import commit_file, commit_json
from core_training.foundation.errors import FedloomError, InputError, RunError
from core_training.foundation.hub_models import hub_model
from core_training.foundation.strict_json import strict_json
from core_training.recipe.learning_rate import with_sites
from core_training.recipe.model_source import as_pinned_before
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.curve import CURVE_FILE, CurveFile, Row
from core_training.runs.events import Event, read_event
from core_training.runs.going_on import check_goes_on, is_same_run, schedule_note
from core_training.runs.run_status import RunStatus, fold

_log = logging.getLogger(__name__)

_RECIPE = "recipe.yaml"

Listener = Callable[[Event], None]
"""A function that is told an event."""

Kind = TypeVar("Kind", bound=Event)


@dataclass
class SiteSummary:
    """One site's part in `summary.json`. What does not apply is None.

    Under differential privacy, `units` are hidden each, and `epsilon` is what the run came to for any of them.
    """

    train_examples: int | None = None
    eval_examples: int | None = None
    eval_loss_initial: float | None = None
    eval_loss: float | None = None
    rounds: int | None = None
    truncated: int | None = None
    dropped: int | None = None
    units: int | None = None
    epsilon: float | None = None


@dataclass
class Summary:
    """`summary.json`. Losses are means per unit of the stage (tokens, pairs or examples); what does not apply is None.

    `truncated` records were cut at `training.max_length`; `dropped` ones had nothing to learn from, or are held out.
    `initial_digest` is of the model that the run started from, which is its reference policy all along, and of the
    reward model that judges, if one does. `rounds` (and `rounds_done`) are those that counted; `void_rounds` changed
    nothing, as too few sites answered, or were left to open the sum. A run that ended for them has `status` failed, and
    no result. `saturated` values, over all rounds and sites, were cut at the clip of a ring codec. `privacy` is the
    account of differential privacy, at the site that it is weakest for (`core_training.privacy.account`). `curve` is
    the file of the run folder that has the figures of each logged step, or round.
    """

    topology: str
    stage: str
    tuning: str
    status: str
    schema: int = 1
    rounds: int | None = None
    rounds_done: int | None = None
    trainable_parameters: int | None = None
    initial_digest: str | None = None
    state_digest: str | None = None
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    eval_loss_initial: float | None = None
    eval_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    bytes_up: int | None = None
    bytes_down: int | None = None
    seconds: dict[str, float | None] = field(default_factory=dict)
    tokens_trained: int | None = None
    truncated: int | None = None
    dropped: int | None = None
    void_rounds: int | None = None
    saturated: int | None = None
    privacy: dict[str, Any] | None = None
    curve: str | None = None
    peak_rss_bytes: int | None = None
    sites: dict[str, SiteSummary] = field(default_factory=dict)


class RunFolder:
    """A run's folder, made when first written to. Each listener is told of every event, after it is written."""

    def __init__(self, path: Path, *listeners: Listener) -> None:
        self._listeners = list(listeners)
        self.path = path if path.name not in ("", "..") else path.resolve()
        self._given_out = 0
        self._is_prepared = False
        self._curve = CurveFile(self.path / CURVE_FILE)

    @property
    def run_id(self) -> str:
        """The folder's name, in the letters that a run id may have."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.path.name).lstrip("._-")[:100] or "run"

    def claimed(self) -> AbstractContextManager[None]:
        """Keep other processes from working on this run meanwhile.

        Raises InputError when one does already, and where no run folder can be made here.
        """
        self.check_place()
        return background.claim(self.path.with_name(f".{self.path.name}.lock"))

    @property
    def recipe(self) -> Recipe:
        """The run's recipe. Raises InputError when there is none."""
        return load_recipe(self.path / _RECIPE)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check_place(self) -> None:
        """Raise InputError where this can be no run folder: nothing may be written, or it holds what is no run's."""
        try:
            foreign = self._foreign()
            # The nearest folder that is there is the one in which something is made.
            nearest = next(one for one in (self.path, *self.path.absolute().parents) if os.path.lexists(one))
            if not nearest.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is no folder")
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"nothing may be written in {nearest}")
        except OSError as error:
            raise self._unusable(error) from None
        if foreign:
            raise InputError(
                f"{self.path} holds no run, but other things ({', '.join(foreign[:3])}{', …' * (len(foreign) > 3)}); "
                "name a new folder, or an empty one, with --out"
            )

    def _foreign(self) -> list[str]:
        """The names in the folder where it is no run's; a run that was killed at once has a place for checkpoints."""
        if not self.path.is_dir() or (self.path / _RECIPE).exists():
            return []
        begun = self.checkpoints.is_dir() and not any(self.checkpoints.iterdir())
        return sorted(
            one.name
            for one in self.path.iterdir()
            if not (begun and (one == self.checkpoints or one.name.startswith(f".{_RECIPE}.")))
        )

    def prepare(self, recipe: Recipe, *, resume: bool) -> None:
        """Make the folder ready for `recipe`, starting anew or going on.

        A folder that holds an earlier run is moved aside (`NAME.1`, `NAME.2`, …) when a new one starts. A run may go
        on with more steps or rounds than it was to have, also when it had ended. Raises InputError when there is
        nothing to resume, when the earlier run had another recipe, or when the folder holds what is no run's.
        """
        self.check_place()
        earlier = self.path / _RECIPE
        if resume:
            if not earlier.exists():
                raise InputError(f"{self.path}: there is no run to resume here; leave out --resume to start one")
            self._check_goes_on(load_recipe(earlier), recipe)
        elif earlier.exists():
            if not self.checkpoints.is_dir():
                raise InputError(f"{self.path} holds a recipe.yaml, but no run; name another folder with --out")
            if Path.cwd().is_relative_to(self.path.resolve()):
                raise InputError(f"{self.path} holds an earlier run; name another folder with --out")
            number = next(n for n in range(1, sys.maxsize) if not self._aside(n).exists())
            try:
                self.path.rename(self._aside(number))
            except OSError as error:
                raise self._unusable(error) from None
            self._given_out, self._curve = 0, CurveFile(self.path / CURVE_FILE)
            _log.warning("%s held an earlier run, which is now %s", self.path, self._aside(number))
        self.forget_failure()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        commit_file(earlier, recipe.to_yaml().encode())
        self._is_prepared = True
        self._note_hub_model(recipe)

    def _unusable(self, error: OSError) -> InputError:
        return InputError(f"{self.path} cannot be made a run folder: {error.strerror}; name another with --out")

    def note_interruption(self) -> str:
        """Note that a signal has ended this run at once; returns what to say: how far it is, and how to go on."""
        if not self._is_prepared:
            return f"interrupted before anything was done; {self.path} is as it was"
        unit = "step" if self.recipe.topology.kind == "central" else "round"
        saved = max((path.name for path in self.checkpoints.glob(f"{unit}-*")), default=None)
        done = self.status().round if saved is None else int(saved.removeprefix(f"{unit}-"))
        with suppress(FedloomError):
            self.event(events.Interrupted(**{unit: done}))
        if done:
            return f"interrupted; {unit} {done} is saved in {self.path}; --resume goes on from it"
        return f"interrupted before the first {unit} was saved in {self.path}; --resume begins with it"

    def _note_hub_model(self, recipe: Recipe) -> None:
        model = hub_model(recipe.model.name_or_path)
        if model is not None and model.is_pinned and (folder := model.snapshot()) is not None:
            digest = recipe.model.digest
            found = events.HubModelFound(model=model.name, revision=model.revision, digest=digest, folder=str(folder))
            self.event(found)

    def pinned(self, recipe: Recipe) -> Recipe:
        """The recipe that goes on with the run here, if there is one: its model and number of sites as they were."""
        if not (self.path / _RECIPE).is_file():
            return recipe
        earlier = load_recipe(self.path / _RECIPE)
        recipe = as_pinned_before(recipe, earlier)
        return recipe if earlier.topology.sites is None else with_sites(recipe, earlier.topology.sites)

    def completed(self, recipe: Recipe) -> dict[str, Any] | None:
        """The summary, if this folder holds the completed run of `recipe`: then there is nothing to resume."""
        summary = self.summary()
        if summary is None or not self.has_completed:
            return None
        return summary if is_same_run(load_recipe(self.path / _RECIPE), recipe) else None

    def keep_recipe(self, text: str) -> None:
        """Write `recipe.yaml`, in the words of whoever started the run."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        commit_file(self.path / _RECIPE, text.encode())

    def event(self, event: Event) -> None:
        """Append one line to `events.jsonl`: the time (UTC), and the event. Raises RunError when the disk refuses."""
        line = strict_json({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event.document()})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # One write of one line to a file opened for appending stays whole beside other writers.
            descriptor = os.open(self.path / "events.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a kill or a full disk cut it short
                data = ("\n" * torn + line + "\n").encode()
                if os.write(descriptor, data) < len(data):
                    raise OSError("the disk is full")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path / 'events.jsonl'} cannot be written: {error}") from error
        for listener in (self._curve.take, *self._listeners):
            listener(event)

    @contextmanager
    def telling(self, listener: Listener) -> Iterator[None]:
        """Tell one more listener of every event while the block runs."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def lines(self, name: str | None = None) -> Iterator[dict[str, Any]]:
        """The lines of `events.jsonl` as they stand, or those of one name. One that a kill cut short is passed over."""
        yield from (line for line, _ in self._read(0) if name is None or line.get("event") == name)

    def events(self, kind: type[Kind]) -> Iterator[Kind]:
        """The events of one kind so far; `Event` stands for all."""
        return (event for line in self.lines(kind.NAME or None) if isinstance(event := read_event(line), kind))

    def status(self) -> RunStatus:
        """The run's status."""
        return fold(self.events(Event))

    def curve(self) -> list[Row]:
        """The rows of `curve.jsonl` so far."""
        return list(self._curve.rows())

    def new_events(self) -> Iterator[Event]:
        """The events that this has not given out yet. A line that is still being written waits for the next time."""
        for line, end in self._read(self._given_out):
            self._given_out = end
            yield read_event(line)

    def _read(self, start: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole lines from byte `start` on that are JSON objects, each with the byte at which it ends."""
        path = self.path / "events.jsonl"
        if not path.exists():
            return
        try:
            for line in read_lines(path, start):
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                with suppress(ValueError):
                    if isinstance(document := parse_value(line), dict):
                        yield document, start
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`, once the name of the curve is in it."""
        summary.curve = CURVE_FILE if (self.path / CURVE_FILE).exists() else None
        commit_json(self.path / "summary.json", asdict(summary))

    def forget_failure(self) -> None:
        """Remove the summary of a run that had failed and goes on."""
        if not self.has_completed:
            (self.path / "summary.json").unlink(missing_ok=True)

    @property
    def has_completed(self) -> bool:
        """Whether the run came to its end, and there is a result."""
        return (self.summary() or {}).get("status") == "completed"

    def summary(self) -> dict[str, Any] | None:
        """The summary that was written, or None while the run goes on. That of a failed run says so in `status`.

        Raises InputError where a pipe, a device or a folder is in its place.
        """
        path = self.path / "summary.json"
        try:
            document = read_json(path)
        except (FileNotFoundError, ForeignTextError):
            return None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        return document if isinstance(document, dict) else None

    def _check_goes_on(self, earlier: Recipe, recipe: Recipe) -> None:
        """Raise InputError where the run cannot go on with `recipe`; where that makes it longer, it has not ended."""
        steps = max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)
        try:
            is_longer = check_goes_on(earlier, recipe, steps)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None
        if is_longer and any(line.get("event") == events.StoppedEarly.NAME for line, _ in self._read(0)):
            raise InputError(f"{self.path}: it stopped early, and would at once again; start another from it")
        if is_longer:
            # Before the recipe is written: a kill in between leaves a run that has only its last evaluation to make.
            (self.path / "summary.json").unlink(missing_ok=True)
            if (note := schedule_note(earlier, recipe)) is not None:
                _log.warning(note)

    def _aside(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def peak_rss_bytes() -> int:
    """The most memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
