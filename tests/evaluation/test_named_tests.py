"""Tests in words are read as they were meant, and their own words read as the same test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import InputError
from evaluation.bridges.named_tests import COMPARISONS, NamedTest, parse_test

figures = st.sampled_from(["exact_match", "length.max", "drift.words", "regex:^a >= b$", "regex:<x>", "regex:p>=1 <="])
numbers = st.floats(-1e6, 1e6).map(lambda number: float(f"{number:g}"))


@given(figures, st.sampled_from(COMPARISONS), numbers, st.booleans())
def test_the_words_of_a_test_are_the_test(figure: str, comparison: str, value: float, is_relative: bool) -> None:
    test = NamedTest(figure, comparison, value, is_relative)
    assert parse_test(test.name) == test


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("exact_match >= 0.5", NamedTest("exact_match", ">=", 0.5)),
        ("exact_match>=.5", NamedTest("exact_match", ">=", 0.5)),
        ("length < 1e2", NamedTest("length", "<", 100.0)),
        ("refusal <= base", NamedTest("refusal", "<=", 0.0, True)),
        ("refusal <= base + 0.02", NamedTest("refusal", "<=", 0.02, True)),
        ("exact_match > reference - 0.1", NamedTest("exact_match", ">", -0.1, True)),
    ],
)
def test_tests_are_read(text: str, test: NamedTest) -> None:
    assert parse_test(text) == test


@pytest.mark.parametrize(
    "text", ["", "length", "length = 3", "length >= ", ">= 3", "length >= base * 2", "length >=> 3"]
)
def test_what_is_no_test_is_told_what_would_be(text: str) -> None:
    with pytest.raises(InputError, match="is no test: write NAME, one of >= <= > <"):
        parse_test(text)
