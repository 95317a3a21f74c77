"""Shares of sources among the records: as the recipe says, none twice, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.data.mixing import mixed
from core_training.foundation.errors import InputError


def test_the_scarcest_source_is_kept_whole_and_the_others_in_proportion() -> None:
    sources = ["a"] * 30 + ["b"] * 100
    kept = mixed(sources, {"a": 3, "b": 1}, seed=0)
    assert kept[:30].tolist() == list(range(30))
    assert len(kept) == 40
    np.testing.assert_array_equal(kept, mixed(sources, {"a": 3, "b": 1}, seed=0))
    assert kept.tolist() != mixed(sources, {"a": 3, "b": 1}, seed=1).tolist()


@given(
    counts=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 200), min_size=1),
    shares=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_no_example_is_kept_twice_and_no_share_is_off_by_more_than_one(
    counts: dict[str, int], shares: list[float], seed: int
) -> None:
    sources = [name for name, count in counts.items() for _ in range(count)]
    wanted = dict(zip(counts, shares, strict=False))
    kept = mixed(sources, wanted, seed)
    assert len(set(kept.tolist())) == len(kept)
    found = {name: sum(sources[i] == name for i in kept) for name in counts}
    most = min(counts[name] / wanted[name] for name in counts)
    assert all(abs(found[name] - most * wanted[name]) <= 1 for name in counts)
    assert any(found[name] == counts[name] for name in counts)


def test_a_source_without_a_share_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.mix: it has shares for a, c, and the records are of a, b"):
        mixed(["a", "b"], {"a": 1, "c": 1}, 0)
