"""The shared random mask: alike for all, of the asked share, and the same however it is cut."""

import numpy as np
import pytest

from core_training.foundation.state import Manifest
from strategies.draws import PIECE
from strategies.selection import Selection, selection_of


def of(size: int) -> Manifest:
    return Manifest.of({"w": (size,)})


def whole(selection: Selection, size: int) -> np.ndarray:
    return np.concatenate([selection.piece(start, min(start + 999, size)) for start in range(0, size, 999)])


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.9])
def test_the_asked_share_travels(keep: float) -> None:
    size = 3 * PIECE + 17
    selection = selection_of(of(size), keep, seed=1, round=2)
    assert selection is not None
    assert abs(selection.count - keep * size) < 5 * np.sqrt(keep * (1 - keep) * size)


def test_pieces_of_any_size_are_parts_of_one_mask_and_add_up_to_the_count() -> None:
    size = 2 * PIECE + 123
    selection = selection_of(of(size), 0.3, seed=1, round=2)
    assert selection is not None
    mask = whole(selection, size)
    assert mask.sum() == selection.count
    assert np.array_equal(selection.piece(PIECE - 5, PIECE + 7), mask[PIECE - 5 : PIECE + 7])
    assert np.array_equal(selection.piece(10, size), mask[10:])


def test_two_parties_choose_alike_and_two_rounds_independently() -> None:
    size = 1 << 16
    first, again, later = (selection_of(of(size), 0.5, seed=3, round=number) for number in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert later is not None
    assert np.array_equal(whole(first, size), whole(again, size))
    both = (whole(first, size) & whole(later, size)).mean()
    assert abs(both - 0.25) < 0.01


def test_all_values_travel_where_nothing_is_asked() -> None:
    assert selection_of(of(10), 1.0, seed=0, round=1) is None
