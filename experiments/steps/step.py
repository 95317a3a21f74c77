"""The interface of a pipeline's step: what it reads, what it does, and what figures come of it.

A kind knows its own keys; names, order, skipping and gates are the pipeline's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.runs.run_folder import RunFolder
from experiments.digests import Digester
from experiments.documents import check_keys
from experiments.figures import check_name
from experiments.running import OnProgress


@dataclass(frozen=True)
class Judgement:
    """What became of a gate that is no figure against a number: its name, what was found, and whether it passed."""

    gate: str
    words: str
    passed: bool


class Step(ABC):
    """A step of a pipeline. `settings` are its keys, with the folders of earlier steps in the place of `${NAME}`."""

    KEY: ClassVar[str]
    """The key by which a step is of this kind."""
    KEYS: ClassVar[tuple[str, ...]] = ()
    """Its other keys."""
    FIGURES: ClassVar[bool] = False
    """Whether it leaves figures, on which there may be gates."""

    def __init__(self, name: str, settings: Mapping[str, Any], folder: Path, home: Path) -> None:
        """`folder` is the step's own, `home` that of the pipeline's file. Raises InputError for an unknown key."""
        self.name = name
        self.settings = settings
        self.folder = folder
        self.home = home
        check_keys(settings, (self.KEY, *self.KEYS), self.place)
        self.check()

    @property
    def place(self) -> str:
        """The beginning of its keys' names in errors."""
        return f"steps.{self.name}."

    def comes_of_a_step(self, name: str) -> bool:
        """Whether a name is of something that a step leaves: its folder, or a file in it."""
        return Path(name).is_relative_to(self.folder.parent)

    @property
    @abstractmethod
    def what(self) -> str:
        """What it is, in a few words for people."""

    @abstractmethod
    def check(self) -> None:
        """Look at all that can be looked at before earlier steps are done. Raises InputError."""

    @abstractmethod
    def digest(self, digester: Digester) -> str:
        """The digest of all that decides its outcome, once the steps are done that it refers to."""

    @abstractmethod
    def run(self, on_progress: OnProgress, *, resume: bool) -> object:
        """Do it, into its folder; `resume` goes on with what lies there. Raises FedloomError.

        Returns what a page on it can be written from, of kinds that have a page of their own; else None.
        """

    @property
    def is_there(self) -> bool:
        """Whether its outcome lies in its folder."""
        return self.folder.is_dir()

    def summary(self) -> dict[str, Any]:
        """The document that its figures are in; empty where it leaves none."""
        return (RunFolder(self.folder).summary() or {}) if self.FIGURES else {}

    def judgements(self) -> list[Judgement]:
        """What became of gates that the kind has of its own, besides the pipeline's."""
        return []

    def check_figure(self, name: str, place: str) -> None:
        """Raise InputError for a figure that none of its kind leaves."""
        check_name(name, place)

    def text_at(self, key: str) -> str:
        """The text under a key. Raises InputError for another value."""
        value = self.settings.get(key)
        if not isinstance(value, str) or not value:
            raise InputError(f"{self.place}{key}: name a run folder, such as ${{sft}}, not {shortened(value)}")
        return value


def set_aside(folder: Path) -> None:
    """Move what a step left there earlier to NAME.1, NAME.2, …, as runs do."""
    if not folder.exists():
        return
    number = next(n for n in range(1, 2**31) if not folder.with_name(f"{folder.name}.{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
