"""All contact with Optuna: the journal that processes share, what proposes values, and what prunes.

Every proposal is drawn with a seed of the search's and of the trial's number in the order of the search (`ordinal`), so
that a search that was killed and goes on proposes what an undisturbed one would have. Optuna's own number of a trial
moves on with each one that was killed, and is used for nothing here.

A process may be killed between any two lines of the journal. So what is asked again is written down before the trial
that it takes the place of is given up, and what was written down twice is asked once.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from core_training.foundation.errors import InputError
from core_training.foundation.strict_json import strict_json
from experiments.search.definition import Pruner, Search
from experiments.search.objectives import Objective
from experiments.search.space import SearchedKey, grid_of, suggested

_ORDINAL, _VALUES, _KILLED = "ordinal", "values", "killed"
_DECIDED = "fixed_params"
"""What Optuna calls the values that a trial was enqueued with."""
_STUDY = "search"


class _Lock:
    """A lock that its process's death frees; whoever takes it cuts a line off that another's death cut short.

    Optuna's own are files, after whose owner's death everybody waits half a minute.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._held: int | None = None

    def acquire(self) -> bool:
        self._held = os.open(self._journal.with_name(f".{self._journal.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        with self._journal.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - 2**20)
            file.seek(start)
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(start + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


class Study:
    """The trials of a search. Ask, and mark as killed, only while `asking` is held."""

    def __init__(self, search: Search) -> None:
        """Open the journal in the search's folder, or begin it. Raises InputError where it is of another search."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._search = search
        self._grid = grid_of(search.keys) if search.sampler.name == "grid" else []
        self._folder = search.output
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output: {self._folder} cannot be made: {error.strerror}") from None
        journal = self._folder / "journal.log"
        with self.asking():
            self._study = optuna.create_study(
                study_name=_STUDY,
                storage=JournalStorage(JournalFileBackend(str(journal), _Lock(journal))),
                sampler=RandomSampler(seed=search.seed),
                pruner=_pruner(search),
                directions=[objective.direction for objective in search.objectives],
                load_if_exists=True,
            )
            self._check_identity()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Keep other processes of this search from asking meanwhile."""
        descriptor = os.open(self._folder / ".asking.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _check_identity(self) -> None:
        wanted, known = strict_json(self._search.identity()), self._study.user_attrs.get("search")
        if known is None:
            self._study.set_user_attr("search", wanted)
        elif known != wanted:
            before, now = json.loads(known), json.loads(wanted)
            differing = ", ".join(key for key in now if now[key] != before.get(key))
            raise InputError(f"output: {self._folder} holds another search (it differs in {differing}); use --out")

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of the search; of those that were killed none, as each was asked again."""
        found = [one for one in self._study.get_trials(deepcopy=False) if not one.user_attrs.get(_KILLED)]
        return sorted((one for one in found if _ORDINAL in one.user_attrs), key=lambda one: one.user_attrs[_ORDINAL])

    def ask(self) -> Trial | None:
        """The next trial, with values for its keys; None where all have been asked."""
        taken, waiting = self._places()
        ordinal = waiting[0] if waiting else next(place for place in itertools.count() if place not in taken)
        if ordinal >= self._end:
            return None
        if self._grid and not waiting:
            labels = {key.name: key for key in self._search.keys}
            self._enqueue({name: _stored(labels[name], value) for name, value in self._grid[ordinal].items()}, ordinal)
        before = [one for one in self.trials if one.user_attrs[_ORDINAL] < ordinal]
        self._study.sampler = _sampler(self._search, ordinal, before)
        if isinstance(self._study.pruner, _Brackets):
            self._study.pruner.asked = ordinal
        trial = self._study.ask()
        trial.set_user_attr(_ORDINAL, ordinal)
        values = suggested(self._search.keys, lambda key: _suggest(trial, key))
        trial.set_user_attr(_VALUES, values)
        return trial

    def ask_again(self, killed: FrozenTrial) -> None:
        """Have a trial's values asked once more, as its process is no more, and mark it as failed."""
        self._enqueue(killed.params, ordinal_of(killed))
        self._give_up(killed)

    def give_up_unasked(self) -> None:
        """Mark trials as failed whose process was killed while it asked: they have no values yet.

        Those whose values were decided before (asked again, or of a grid) keep them for whoever asks next.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get(_KILLED):  # and whoever marked it was killed itself
                self._give_up(trial)
            elif _ORDINAL not in trial.user_attrs or _VALUES not in trial.user_attrs:
                if (decided := trial.system_attrs.get(_DECIDED)) is not None:
                    self._enqueue(decided, ordinal_of(trial))
                self._give_up(trial)

    @property
    def _end(self) -> int:
        """How many trials there are to be."""
        return min(self._search.trials, len(self._grid)) if self._grid else self._search.trials

    def _places(self) -> tuple[set[int], list[int]]:
        """The ordinals of trials that run or have ended, and of those that wait, in the order in which they are asked.

        What waits for a place that another has, or that is beyond the end, is given up.
        """
        taken = {ordinal_of(one) for one in self.trials if one.state != TrialState.WAITING}
        waiting: list[int] = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            ordinal = ordinal_of(trial)
            if trial.user_attrs.get(_KILLED) or ordinal in taken or ordinal in waiting or ordinal >= self._end:
                self._give_up(trial)
            else:
                waiting.append(ordinal)
        return taken, waiting

    def _enqueue(self, params: Mapping[str, Any], ordinal: int) -> None:
        """Have these values asked next, unless that is written down already."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not any(ordinal_of(one) == ordinal and not one.user_attrs.get(_KILLED) for one in waiting):
            self._study.enqueue_trial(dict(params), user_attrs={_ORDINAL: ordinal})

    def _give_up(self, trial: FrozenTrial) -> None:
        """Mark a trial as killed, which takes its place in the search from it, then as failed."""
        self._study._storage.set_trial_user_attr(trial._trial_id, _KILLED, True)
        self._study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)

    def tell(self, trial: Trial, values: Sequence[float] | None, state: str, notes: Mapping[str, Any]) -> None:
        """Write down how a trial ended: complete (with values), pruned or failed."""
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        ended = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]
        self._study.tell(trial, None if values is None else list(values), state=ended)

    def best(self) -> list[FrozenTrial]:
        """The best trial or, with several objectives, those that no other is better than in all; none before one."""
        complete = [one for one in self.trials if one.state == TrialState.COMPLETE]
        if not complete:
            return []
        if len(self._search.objectives) > 1:
            return sorted(self._study.best_trials, key=lambda one: one.user_attrs[_ORDINAL])
        return ranked(complete, self._search.objectives[0])[:1]

    def importances(self) -> dict[str, float]:
        """The share of each key in what the first objective depends on; empty where too few trials are complete."""
        complete = [one for one in self.trials if one.state == TrialState.COMPLETE]
        if len(complete) < 4 or len(self._search.keys) < 2:
            return {}
        try:
            # It looks for what makes its target small; the only objective it takes as it is meant.
            sign = 1.0 if self._search.objectives[0].direction == "minimize" else -1.0
            first = None if len(self._search.objectives) == 1 else lambda one: sign * float(one.values[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found = optuna.importance.get_param_importances(self._study, target=first)
        except (ValueError, RuntimeError):  # no key that all of them have, or all came to the same
            return {}
        return {name: float(share) for name, share in found.items()}


def ordinal_of(trial: Trial | FrozenTrial) -> int:
    """A trial's number in the order of the search, from 0."""
    return int(trial.user_attrs[_ORDINAL])


def values_of(trial: Trial | FrozenTrial) -> dict[str, Any]:
    """The recipe's values of a trial, by their keys."""
    return dict(trial.user_attrs[_VALUES])


def ranked(trials: Sequence[FrozenTrial], objective: Objective) -> list[FrozenTrial]:
    """Complete trials, best first; of equals the earlier one."""
    sign = 1.0 if objective.direction == "minimize" else -1.0
    return sorted(trials, key=lambda one: (sign * one.values[0], ordinal_of(one)))


def seed_of(seed: int, ordinal: int) -> int:
    """The seed of a proposal: 31 bits of a digest, so that those of neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed} {ordinal}".encode()).digest()[:4], "big") >> 1


def _stored(key: SearchedKey, value: Any) -> Any:
    return key.labels[key.choices.index(value)] if key.kind == "categorical" else value


def _suggest(trial: Trial, key: SearchedKey) -> Any:
    if key.kind == "categorical":
        return key.choices[key.labels.index(trial.suggest_categorical(key.name, key.labels))]
    if key.kind == "int":
        step = 1 if key.log or key.step is None else int(key.step)
        return trial.suggest_int(key.name, int(key.low), int(key.high), step=step, log=key.log)
    return trial.suggest_float(key.name, key.low, key.high, step=key.step, log=key.log)


def _sampler(search: Search, ordinal: int, before: Sequence[FrozenTrial]) -> BaseSampler:
    seed, startup = seed_of(search.seed, ordinal), search.sampler.startup_trials
    if search.sampler.name == "tpe":
        return TPESampler(n_startup_trials=startup, seed=seed)
    if search.sampler.name == "cma":
        try:
            from experiments.search.evolution import Evolution
        except ImportError:
            raise InputError(
                "sampler: cma needs cmaes, which is not installed: pip install 'fedloom[search]'"
            ) from None
        return Evolution(search.keys, ordinal, before, startup, seed)
    return RandomSampler(seed=seed)


class _Brackets(HyperbandPruner):  # type: ignore[misc]
    """Hyperband, in which a trial's bracket goes by its place in the search."""

    asked = 0
    """The place of the trial that is being asked for."""

    def _get_bracket_id(self, study: Any, trial: FrozenTrial) -> int:
        numbered = copy.copy(trial)
        numbered.number = trial.user_attrs.get(_ORDINAL, self.asked)
        return int(super()._get_bracket_id(study, numbered))


def _pruner(search: Search) -> BasePruner:
    pruner: Pruner = search.pruner
    if pruner.name == "median":
        return MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=pruner.warmup)
    if pruner.name == "hyperband":
        return _Brackets(min_resource=max(1, pruner.warmup), reduction_factor=pruner.factor)
    return NopPruner()
