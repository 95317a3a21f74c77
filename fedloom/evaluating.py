"""What the commands that have models answer share: where their files lie, and a progress bar for each thing done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.console import ticking

if TYPE_CHECKING:
    from evaluation.items import Task
    from fedloom.console import Ticker

RESULTS = "results.json"
"""The figures, in a command's folder."""


def usual_folder(kind: str, model: str, tasks: list[Task]) -> Path:
    """Where a command's files lie unless `--to` says it: in the folder `kind` beside a run, or here."""
    place = Path(model)
    names = "-".join(task.name.replace("/", "_") for task in tasks)
    if (place / "recipe.yaml").is_file():
        return place.parent / kind / f"{place.name or 'model'}-{names}"
    # Here there may be those of other models of that name, from other places.
    where = str(place.resolve()) if place.exists() else model
    digest = hashlib.sha256(where.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return Path(kind) / f"{place.name or 'model'}-{digest}-{names}"


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done, one after the other."""
    with ExitStack() as stack:
        bars: dict[str, Ticker] = {}

        def advance(doing: str, done: int, total: int) -> None:
            if doing not in bars:
                stack.pop_all().close()
                bars.clear()
                bars[doing] = stack.enter_context(ticking(doing, "item", quiet=quiet))
            bars[doing].advance(done, total)

        yield advance
