"""The size that Arrow's columns unfold to: a dictionary's word, a run and a view count as often as they are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_VALUE_BYTES = 8
"""What a row, and a value of no fixed size, counts for besides its content: many have none."""


def written_out(batch: Any) -> float:
    """The bytes of a record batch's values, each written out. The batch must be valid (`validate(full=True)`).

    Raises pyarrow.ArrowInvalid for unions, which no table of records has.
    """
    return sum((float(_sizes(column).sum()) for column in batch.columns), start=float(_VALUE_BYTES * batch.num_rows))


def _sizes(column: Any) -> NDArray[np.float64]:
    """The bytes of each of an array's values [values]. Not whole numbers, which nested views could have overflow."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.types as types

    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        return _sizes(column.storage)
    if types.is_dictionary(kind):
        named: NDArray[np.int64] = column.indices.cast(pa.int64()).fill_null(len(column.dictionary)).to_numpy()
        return np.append(_sizes(column.dictionary), 0.0)[named]
    if types.is_run_end_encoded(kind):
        places = np.arange(column.offset, column.offset + len(column))
        runs: NDArray[np.intp] = np.searchsorted(column.run_ends.to_numpy(), places, side="right")
        return _sizes(column.values)[runs]
    if types.is_struct(kind):
        parts = (_sizes(column.field(index)) for index in range(kind.num_fields))
        return sum(parts, start=np.full(len(column), float(_VALUE_BYTES)))
    if types.is_union(kind):
        raise pa.ArrowInvalid("a column of several types (union)")
    if types.is_nested(kind):
        begins, ends = _places(column)
        before: NDArray[np.float64] = np.append(0.0, np.cumsum(_sizes(column.values)))
        return before[ends] - before[begins] + _VALUE_BYTES
    return _sizes_of_plain(column)


def _places(column: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each list of an array begins and ends among the array's values, each [lists]."""
    import numpy as np
    import pyarrow.types as types

    if types.is_fixed_size_list(column.type):
        begins = np.arange(column.offset, column.offset + len(column)) * column.type.list_size
        return begins, begins + column.type.list_size
    offsets = column.offsets.to_numpy().astype(np.int64)
    if types.is_list_view(column.type) or types.is_large_list_view(column.type):
        return offsets, offsets + column.sizes.to_numpy()
    return offsets[:-1], offsets[1:]


def _sizes_of_plain(column: Any) -> NDArray[np.float64]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as types

    kind = column.type
    if types.is_string_view(kind) or types.is_binary_view(kind):
        lengths = _lengths_of_views(column)
    elif types.is_null(kind):
        lengths = np.zeros(len(column), np.int32)
    elif any(one(kind) for one in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        lengths = pc.binary_length(column).cast(pa.int64()).fill_null(0).to_numpy()
    else:
        return np.full(len(column), max(kind.bit_width / 8, 1.0))
    return lengths.astype(np.float64) + _VALUE_BYTES


def _lengths_of_views(column: Any) -> NDArray[np.int32]:
    """The first of each view's four numbers. To cast the column would write it out."""
    import numpy as np

    if not len(column):
        return np.zeros(0, np.int32)
    numbers = np.frombuffer(column.buffers()[1], np.int32).reshape(-1, 4)
    lengths = numbers[column.offset : column.offset + len(column), 0]
    return np.where(column.is_valid().to_numpy(zero_copy_only=False), lengths, 0)
