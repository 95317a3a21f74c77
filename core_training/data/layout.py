"""A layout: one set of columns that people's files have, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from core_training.data.records import Record
from core_training.parts.data_kinds.values import Values

Raw = dict[str, Any]
"""A record's fields, under the layout's own names."""


V = TypeVar("V", bound=Values)


@dataclass(frozen=True)
class Layout(Generic[V]):
    """One set of columns. `read` raises ValueError with what is wrong."""

    required: tuple[str, ...]
    read: Callable[[Raw], V]
    optional: tuple[str, ...] = ()

    def fits(self, record: Record, columns: Mapping[str, str]) -> bool:
        """Whether the record has the columns; `columns` are the files' names of those that are called otherwise."""
        return self.filled(record, columns) == len(self.required)

    def filled(self, record: Record, columns: Mapping[str, str]) -> int:
        """The number of its columns that say something in the record."""
        return sum(record.fields.get(columns.get(column, column)) is not None for column in self.required)

    def names(self, record: Record, columns: Mapping[str, str]) -> bool:
        """Whether the record has the columns at all, be they empty."""
        return all(columns.get(column, column) in record.fields for column in self.required)
