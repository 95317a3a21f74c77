"""From a record's fields to what a stage reads, in whatever layout the record stands; knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core_training.data.layout import Layout
from core_training.data.records import Record
from core_training.data.turns import tools_of
from core_training.data.unknown import UNUSED_COLUMNS
from core_training.foundation.errors import InputError
from core_training.parts.data_kinds import DATA_KINDS, TEXT
from core_training.parts.data_kinds.values import Values
from core_training.parts.stages import STAGES


def read_values(record: Record, stage: str, columns: Mapping[str, str]) -> Values:
    """A record's values for a stage; `columns` has the files' names of those columns that are called otherwise.

    Of the layouts that the record has, the first of the stage's that uses most of the renamed columns is read.
    Raises InputError naming the record: without the columns, with which stages would fit; or with what is wrong in one.
    """
    layouts = _layouts(stage)
    fitting = [layout for layout in layouts if layout.fits(record, columns)]
    if not fitting and (named := [layout for layout in layouts if layout.names(record, columns)]):
        fitting = [max(named, key=lambda one: one.filled(record, columns))]
    if not fitting:
        raise InputError(_wrong_columns(record, stage, columns))
    layout: Layout[Values] = max(fitting, key=lambda one: len(set(one.required) & set(columns)))
    raw = {column: record.fields[columns.get(column, column)] for column in layout.required}
    for column in layout.optional:
        if record.fields.get(columns.get(column, column)) not in (None, "", []):
            raw[column] = record.fields[columns.get(column, column)]
    try:
        return _with_tools(record, layout.read(raw), columns, {*layout.required, *layout.optional})
    except ValueError as error:
        raise InputError(f"{record.place}: {error}") from None


_TOOLS = "tools"


def _with_tools(record: Record, values: Values, columns: Mapping[str, str], read: set[str]) -> Values:
    """The values with the record's tools. Raises ValueError for columns that would be left out without a word."""
    conversation = hasattr(values, _TOOLS)
    named = {columns.get(column, column) for column in (*read, _TOOLS)}
    for column in UNUSED_COLUMNS if conversation else ():
        if column not in named and record.fields.get(column):
            raise ValueError(
                f"the column '{column}' cannot be used; leave it out of the records, call it otherwise, or set "
                "data.unknown: warn"
            )
    tools = record.fields.get(columns.get(_TOOLS, _TOOLS))
    if conversation and tools and _TOOLS not in read:
        return replace(values, tools=tools_of(tools))  # type: ignore[type-var]
    return values


def known_columns(stage: str) -> list[str]:
    """All columns that a stage can read."""
    names = [name for layout in _layouts(stage) for name in (*layout.required, *layout.optional)]
    names += [_TOOLS] if STAGES[stage].reads is not TEXT else []
    return list(dict.fromkeys(names))


def column_sets(stage: str) -> list[tuple[str, ...]]:
    """The sets of columns that a stage can read a record from, best first; optional columns are left out."""
    return [layout.required for layout in _layouts(stage)]


def _layouts(stage: str) -> tuple[Layout[Any], ...]:
    layouts: tuple[Layout[Any], ...] = STAGES[stage].reads.load()
    return layouts


def _wrong_columns(record: Record, stage: str, columns: Mapping[str, str]) -> str:
    wanted = " or ".join("+".join(columns.get(c, c) for c in layout.required) for layout in _layouts(stage))
    has = ", ".join(record.fields) or "nothing"
    fits = {
        kind.name: max((len(layout.required) for layout in kind.load() if layout.fits(record, columns)), default=0)
        for kind in DATA_KINDS.values()
    }
    closest = [kind for kind in fits if fits[kind] == max(fits.values()) > 0]
    others = [part.name for part in STAGES.values() if part.reads.name in closest]
    advice = f"These columns fit stage {', '.join(others)}; or map" if others else "Map"
    return f"{record.place}: stage {stage} needs {wanted}; the record has {has}. {advice} names with data.columns"
