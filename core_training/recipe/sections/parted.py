"""Sections that have one of their own for each part of a table: of each stage, mode, rule, codec, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import Field, create_model

from core_training.parts.registry import Part, S
from core_training.parts.section import Section


class Parted(Section):
    """A section with one of its own for each part of a table that has settings."""

    def settings(self, part: Part[S]) -> S:
        """A part's section."""
        section: S = getattr(self, part.name)
        return section

    def sections_of(self, parts: Mapping[str, Part[Any]]) -> list[tuple[str, Section]]:
        """The names and sections of those that have one."""
        return [(part.name, self.settings(part)) for part in parts.values() if part.settings is not None]


P = TypeVar("P", bound=Parted)


def with_sections(parts: Mapping[str, Part[Any]]) -> Callable[[type[P]], type[P]]:
    """Add to a class the sections of these parts."""

    def extended(parted: type[P]) -> type[P]:
        sections: dict[str, Any] = {
            part.name: (part.settings, Field(default_factory=part.settings))
            for part in parts.values()
            if part.settings is not None
        }
        return create_model(parted.__name__, __base__=parted, __doc__=parted.__doc__, **sections)

    return extended
