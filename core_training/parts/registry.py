"""Tables of parts by name: fedloom's own, and those that other installed packages offer under an entry point.

A package offers a part by naming it in its metadata, as in `[project.entry-points."fedloom.stages"]`,
`my_stage = "my_package.my_stage:MY_STAGE"`; the part's own name is what recipes say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from core_training.foundation.errors import InputError
from core_training.parts.section import Section

S = TypeVar("S", bound=Section)

_PARTED = ("settings", "sections_of")
"""The methods of every section that holds parts' sections."""

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True, kw_only=True)
class Part(Generic[S]):
    """The facts of a part, known without loading it."""

    name: str
    target: str | Callable[..., Any]
    """`module:name` of what does the work, imported when it is needed; or that itself, in a program of one's own."""
    settings: type[S] | None = None
    """Its section of the recipe, under its own name; None where there is nothing to set."""
    usual_keys: tuple[str, ...] = ()
    """The keys that one usually sets, to be shown in a new recipe; empty: all of them."""

    def load(self) -> Any:
        """Import what does the work."""
        if not isinstance(self.target, str):
            return self.target
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)

    def make(self, section: Any, *given: Any) -> Any:
        """Make what does the work, of `given` and, where the part has settings, those in `section`."""
        own = () if self.settings is None else (getattr(section, self.name),)
        return self.load()(*given, *own)


P = TypeVar("P", bound=Part[Any])


class Registry(Mapping[str, P]):
    """The parts of one kind, in the order in which people are shown them."""

    def __init__(self, kind: type[P], group: str, own: Sequence[P], reserved: Collection[str] = ()) -> None:
        """`group` is the entry point of other packages' parts; `reserved` are the keys beside the parts' sections."""
        self._kind = kind
        self._group = group
        self._own = own
        self._reserved = reserved
        self._faults: list[str] = []

    @cached_property
    def _parts(self) -> dict[str, P]:
        """All parts. Other packages' are loaded at the first look: their modules import tables such as this one."""
        parts = {part.name: part for part in self._own}
        for entry in sorted(entry_points(group=self._group), key=lambda entry: entry.name):
            if (fault := self._add(entry, parts)) is not None:
                self._faults.append(f"entry point '{entry.name}' of {self._group} ({entry.value}) {fault}")
        return parts

    def add(self, part: P) -> None:
        """Take in a part of this process's own. Raises InputError for one that cannot be used, or that comes too late.

        Recipes know the parts that were there when the first of them was made.
        """
        if "_parts" in self.__dict__:
            raise InputError(f"part '{part.name}': recipes are in use already; add it before anything of a recipe's")
        if (fault := self._fault(part, {one.name: one for one in self._own})) is not None:
            raise InputError(f"the part {fault}")
        self._own = [*self._own, part]

    def check(self) -> None:
        """Raise InputError for a package's part that cannot be used; importing fedloom never fails for one."""
        if self._parts and self._faults:
            raise InputError(f"{'; '.join(self._faults)}; mend the package or uninstall it")

    def _add(self, entry: EntryPoint, parts: dict[str, P]) -> str | None:
        """Take in another package's part. Returns what is wrong with one that cannot be used."""
        try:
            part = entry.load()
        except Exception as error:
            return f"cannot be loaded: {type(error).__name__}: {error}"
        if (fault := self._fault(part, parts)) is None:
            parts[part.name] = part
        return fault

    def _fault(self, part: Any, parts: Mapping[str, P]) -> str | None:
        """The fault of a part; `parts` are those that are there."""
        if not isinstance(part, self._kind):
            return f"is a {type(part).__name__}, and has to be a {self._kind.__name__}"
        if part.name in parts:
            return f"has the name of another part, '{part.name}'"
        taken = part.name in (*self._reserved, *_PARTED) or hasattr(Section, part.name)
        if taken or not _NAME.match(part.name):
            return f"cannot be called '{part.name}': a name is lower-case letters, digits and _, and no key of recipes"
        return None

    def __getitem__(self, name: str) -> P:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
