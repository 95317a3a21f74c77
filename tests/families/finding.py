"""What a walk through a family's cells finds."""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import core_training.foundation.environment  # noqa: F401  # isort: skip - before PyTorch is imported
import torch

from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.context import UNLIMITED, context_length
from core_training.tuning import reach
from tests.families.building import UNBUILT, TooLarge, make_family
from tests.families.tokenizers import KINDS, make_tokenizer
from tests.families.walk import WALKS, Family


@dataclass
class Found:
    """What a family's walk found; `outcomes` says of each cell `right`, or what was said or went wrong."""

    name: str
    adapted: str = ""
    in_four_bits: str = ""
    packs: bool = False
    context: int = 0
    outcomes: dict[str, str] = field(default_factory=dict)

    def row(self) -> str:
        """A line of the table."""
        right = [cell for cell, outcome in self.outcomes.items() if outcome == "right"]
        others: dict[str, list[str]] = defaultdict(list)
        for cell, outcome in self.outcomes.items():
            if outcome != "right":
                others[outcome].append(cell)
        said = "; ".join(
            f"{'all' if len(cells) == len(self.outcomes) else ', '.join(cells)}: {outcome}"
            for outcome, cells in others.items()
        )
        context = "–" if self.context in (0, UNLIMITED) else "stated"
        packs = "yes" if self.packs else "no"
        return f"| {self.name} | {len(right)} | {self.adapted} | {self.in_four_bits} | {packs} | {context} | {said} |"


def walk_through(name: str) -> Found | str:
    """A family's cells; or why it could not be built."""
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place), Found(name)
        try:
            kind = list(KINDS)[sum(map(ord, name)) % len(KINDS)]
            model = make_family(name, make_tokenizer(kind, folder / kind), folder / "base")
        except TooLarge as error:
            return str(error)
        except Exception as error:  # a configuration that cannot be guessed raises anything
            return f"{name}: {UNBUILT.get(name) or _line(error)}"
        _look(found, Family(name, model, folder / "look"))
        for cell, walk in WALKS.items():
            (folder / cell).mkdir()
            try:
                walk(Family(name, model, folder / cell))
            except InputError as error:
                found.outcomes[cell] = _line(error).replace(f"model.name_or_path: {model}: ", "").partition(";")[0]
            except Exception as error:
                found.outcomes[cell] = f"**{type(error).__name__}** {_line(error)}"
            else:
                found.outcomes[cell] = "right"
        return found


def _look(found: Found, family: Family) -> None:
    """Note what adapters and four bits reach, and how the model reads."""
    with _shares() as told:
        try:
            family.folder.mkdir()
            base = BaseModel(family.recipe("look"))
            found.packs, found.context = base.keeps_examples_apart, context_length(base.model)
            BaseModel(family.recipe("look", tuning={"mode": "qlora"}))
        except Exception:  # the cells say what it is
            return
    found.adapted = told.get("tuning.lora: adapters reach", "100%")
    found.in_four_bits = told.get("tuning.qlora: four bits hold", "100%")


@contextmanager
def _shares() -> Iterator[dict[str, str]]:
    """The shares that are told meanwhile, by what is told of them."""
    told: dict[str, str] = {}

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            what, _, share = record.getMessage().partition("%")[0].rpartition(" ")
            told[what] = f"{share}%"

    listener, log = Listener(), logging.getLogger(reach.__name__)
    log.addHandler(listener)
    reach._tell.cache_clear()
    try:
        yield told
    finally:
        log.removeHandler(listener)


def _line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return said.replace("|", "\\|")[:160] or type(error).__name__
