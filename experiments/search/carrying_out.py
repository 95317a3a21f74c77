"""Carrying a search out: asks for trials and runs them one after the other, beside other processes of the same search.

Each trial's lock is held by the process that runs it. A trial that is running by the journal and whose lock is free was
killed: whoever asks next marks it, and it is asked again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.background import claim, claim_if_free
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError, RunError
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from experiments.running import OnProgress
from experiments.search.confirmation import confirmed
from experiments.search.definition import Search
from experiments.search.engines import Engines
from experiments.search.outcome import OUTCOME_FILE, SearchOutcome, best_recipes, outcome_of
from experiments.search.trial import Ended, OnStep, charge_killed, run_trial, tidied, without_result

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

    from experiments.search.study import Study

_FAILED_IN_A_ROW = 3
_LOOKED_AGAIN = 0.3
_LONGEST_CONFIRMATION = 7 * 86400.0
OnTrial = Callable[[int, Ended, dict[str, Any]], None]
"""Told of a trial that ended: its number, how, and its values."""
Watch = Callable[[str], AbstractContextManager[OnProgress]]
"""What shows the progress of a run with this label."""


def carry_out(
    search: Search,
    watch: Watch,
    on_trial: OnTrial = lambda *_: None,
    *,
    must_exist: bool = False,
) -> SearchOutcome:
    """Run what is left of the search's trials, confirm the best, and write `best.yaml` and `search.json`.

    Raises InputError for a folder of another search, and RunError where trials fail one after the other.
    """
    if must_exist and not (search.output / "journal.log").is_file():
        raise InputError(f"{search.output}: there is no search to resume here; leave out --resume to start one")
    _check_folder(search.output)
    if find_spec("optuna") is None:
        raise InputError("a search needs Optuna, which is not installed: pip install 'fedloom[search]'")
    from experiments.search.study import Study

    began = time.perf_counter()
    study = Study(search)
    work = _Work(search, study, watch, on_trial)
    work.until_done()
    with claim(search.output / ".confirming", patience=_LONGEST_CONFIRMATION):
        winners = confirmed(search, study, watch)
        outcome = outcome_of(search, study, winners)
        for name, recipe in best_recipes(search, outcome).items():
            commit_file(search.output / name, recipe.to_yaml().encode())
        outcome.seconds |= {"here": time.perf_counter() - began, "bookkeeping": work.bookkeeping}
        commit_file(search.output / OUTCOME_FILE, outcome.text().encode())
    return outcome


def _check_folder(folder: Path) -> None:
    """Raise InputError where the folder holds other things than a search."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "journal.log").exists():
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if names:
            raise InputError(
                f"{folder} holds no search, but other things ({', '.join(names[:3])}); name another with --out"
            )


class _Work:
    """The trials of this process. `bookkeeping` are the seconds that were no trial's."""

    def __init__(self, search: Search, study: Study, watch: Watch, on_trial: OnTrial) -> None:
        self._search = search
        self._study = study
        self._watch = watch
        self._on_trial = on_trial
        self._engines = Engines()
        self._failed = 0
        self.bookkeeping = 0.0

    def until_done(self) -> None:
        """Ask and run until no trial is left, nor one that another process runs and might not end."""
        while True:
            with self._counted():
                asked, others = self._ask()
            if asked is not None:
                trial, lock = asked
                with lock:
                    self._run(trial)
            elif others:
                time.sleep(_LOOKED_AGAIN)
            else:
                self._engines.close()
                return

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.bookkeeping += time.perf_counter() - began

    def _ask(self) -> tuple[tuple[Trial, ExitStack] | None, int]:
        """The next trial, claimed, and how many others are running."""
        from experiments.search.study import ordinal_of

        with self._study.asking():
            self._study.give_up_unasked()
            running = [one for one in self._study.trials if one.state.name == "RUNNING"]
            alive = [one for one in running if not self._take_over(one)]
            trial = self._study.ask()
            if trial is None:
                return None, len(alive)
            with ExitStack() as claimed:  # until the trial has ended
                claimed.enter_context(claim(lock := self._lock(ordinal_of(trial))))
                claimed.callback(lock.unlink, missing_ok=True)
                return (trial, claimed.pop_all()), len(alive)

    def _take_over(self, trial: FrozenTrial) -> bool:
        """Have a trial asked again whose process is no more; whether it was so."""
        from experiments.search.study import ordinal_of

        ordinal = ordinal_of(trial)
        with claim_if_free(self._lock(ordinal)) as is_dead:  # all who ask wait meanwhile, so it must not
            if is_dead:
                self._set_aside(self._folder(ordinal))
                self._study.ask_again(trial)
            return is_dead

    def _set_aside(self, folder: Path) -> None:
        """Charge a killed trial's account, then remove its folder: under another name first, which charges it once."""
        charge_killed(folder)
        self._charge(folder)
        removed = folder.with_name(f".{folder.name}.killed")
        shutil.rmtree(removed, ignore_errors=True)  # where whoever removed it was killed
        if folder.is_dir():
            folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def _lock(self, ordinal: int) -> Path:
        self._trials.mkdir(exist_ok=True)
        return self._trials / f".{ordinal:04d}.running"

    @property
    def _trials(self) -> Path:
        return self._search.output / "trials"

    def _folder(self, ordinal: int) -> Path:
        return self._trials / f"{ordinal:04d}"

    def _run(self, trial: Trial) -> None:
        from experiments.search.study import ordinal_of, values_of

        ordinal, values = ordinal_of(trial), values_of(trial)
        folder = self._folder(ordinal)
        began = time.perf_counter()
        with self._watch(f"trial {ordinal}") as on_progress:
            steps: OnStep = lambda done, total: on_progress(done, total, "")  # noqa: E731
            try:
                recipe = self._search.recipe_with(values, folder)
                ended = run_trial(recipe, self._search.objectives, self._engines, self._pruner_of(trial), steps)
            except InputError as error:  # the recipe takes these values one by one, and not together
                ended = Ended("failed", why=str(error), seconds={"trial": time.perf_counter() - began})
        with self._counted():
            self._settle(trial, folder, ended)
        self.bookkeeping += ended.seconds.get("pruner", 0.0)
        self._on_trial(ordinal, ended, values)
        self._failed = self._failed + 1 if ended.state == "failed" else 0
        if self._failed == _FAILED_IN_A_ROW:
            raise RunError(f"{_FAILED_IN_A_ROW} trials failed one after the other; the last: {ended.why}")

    def _pruner_of(self, trial: Trial) -> Callable[[int, float], bool] | None:
        if self._search.pruner.name == "none":
            return None

        def should_prune(slice_number: int, value: float) -> bool:
            trial.report(value, slice_number)
            return bool(trial.should_prune())

        return should_prune

    def _settle(self, trial: Trial, folder: Path, ended: Ended) -> None:
        """Write down how a trial ended, and remove what nobody will want of it."""
        notes: dict[str, Any] = {"seconds": ended.seconds} | ({"why": ended.why} if ended.why else {})
        tidied(folder)
        self._charge(folder)
        with self._study.asking():
            self._study.tell(trial, ended.values, ended.state, notes)
            if self._search.keep == "best":
                self._keep_best()

    def _keep_best(self) -> None:
        from experiments.search.study import ordinal_of

        best = {ordinal_of(one) for one in self._study.best()}
        for one in self._study.trials:
            if one.state.is_finished() and ordinal_of(one) not in best:
                without_result(self._folder(ordinal_of(one)))

    def _charge(self, folder: Path) -> None:
        """Add a trial's account of differential privacy to the search's: all trials read the same records."""
        own = folder / LEDGER_FILE
        if own.is_file():
            whole = PrivacyLedger(self._search.output / LEDGER_FILE)
            for line in PrivacyLedger(own).lines():
                whole.charge(f"trial-{folder.name}", line.at, line.digest, line.release)
