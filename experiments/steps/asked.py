"""What steps ask models: a file's place beside the pipeline's, the tasks of it, and a digest of all that is in them."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.data.hub_cache import cached_files
from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.recipe.llamafactory_data import names_data_set
from experiments.digests import Digester
from experiments.steps.step import Step

if TYPE_CHECKING:
    from evaluation.items import Task


HELD_OUT = "held-out"
"""In the place of a file: what the first run held out."""


def place_of(on: str, home: Path) -> str:
    """What `on` names in the folder `home`, a glob too, or where that has none, in the one that the command runs in."""
    own = home / Path(on).expanduser()
    return str(own) if is_found(own) else str(Path(on).expanduser())


def check_on(step: Step, on: str) -> None:
    """Raise InputError for what is neither a file here, nor of an earlier step, nor a data set of the hub's cache."""
    if on == HELD_OUT or step.comes_of_a_step(on) or is_found(Path(place_of(on, step.home))):
        return
    if Path(on).suffix or not cached_files(on):
        raise InputError(f"{step.place}on: {on}: no such file beside the pipeline's, nor in {Path.cwd()}")


def temperature_at(settings: Mapping[str, Any], place: str) -> float:
    """The temperature, 0 where none is given. Raises InputError for what is none."""
    warmth = settings.get("temperature", 0.0)
    if isinstance(warmth, bool) or not isinstance(warmth, int | float) or not 0 <= warmth < 100:
        raise InputError(f"{place}temperature: give a number from 0 up, not {shortened(warmth)}")
    return float(warmth)


def is_found(place: Path) -> bool:
    """Whether a file, a folder, a glob or a data set of LLaMA-Factory's is on this machine."""
    file = Path(str(place).rpartition(":")[0]) if names_data_set(place) else place
    return file.exists() or bool(glob.glob(str(file), recursive=True))


def tasks_of(on: Sequence[str], models: Sequence[str], home: Path, **wanted: Any) -> list[Task]:
    """The tasks of these names, beside the pipeline's file first. Raises InputError as `load_tasks`."""
    from evaluation.tasks.loading import load_tasks

    return load_tasks([place_of(one, home) for one in on], models, "on", **wanted)


def digest_of_task(task: Task, digester: Digester) -> list[Any]:
    """All fields of a task, its items among them, and the content of its own functions."""
    from evaluation.figures.metrics import is_own

    fields = hashlib.sha256(repr(task).encode("utf-8", "surrogatepass")).hexdigest()
    own = [file for name in task.metrics if is_own(name) for file in function_files(name)]
    return [fields, [digester.of_place(file) for file in own]]


def function_files(name: str) -> Iterator[Path]:
    """The file of a function, `FILE.py:name` or `module:name`; none for what names no function here."""
    module, colon, function = name.rpartition(":")
    if not colon or not function.isidentifier():
        return
    if module.endswith(".py"):
        file: str | None = module
    else:
        try:
            found = importlib.util.find_spec(module)
        except (Exception, SystemExit) as error:  # the package is the person's own: it may raise anything
            raise InputError(f"{name}: {module} cannot be imported: {type(error).__name__}: {error}") from None
        file = None if found is None else found.origin
    if file is not None and Path(file).is_file():
        yield Path(file)
