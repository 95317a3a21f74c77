"""Figures of written answers: hand-made tables, and the longest common subsequence by its plain recurrence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.figures import words


def plain_common_length(one: list[str], other: list[str]) -> int:
    """The recurrence, cell by cell."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_the_common_subsequence_is_as_long_as_the_recurrence_says(one, other):
    assert words._common_length(one, other) == plain_common_length(one, other)


@pytest.mark.parametrize(
    ("answer", "expected", "f"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, section 3.1: ROUGE-L of S2
        ("the gunman police killed", "police kill the gunman", 0.5),
        ("Police, killed!", "police killed", 1.0),
        ("", "police", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l_is_that_of_its_authors_examples(answer, expected, f):
    assert words.rouge_l(answer, expected) == pytest.approx(f)


@pytest.mark.parametrize(
    ("answer", "expected", "f1", "same", "quasi"),
    [
        ("The heart ward.", "heart ward", 1.0, 0, 1),
        ("heart  ward", "heart ward", 1.0, 1, 1),
        ("the lung ward", "heart ward", 0.5, 0, 0),
        ("ward ward", "ward", 2 / 3, 0, 0),
        ("liver", "heart", 0.0, 0, 0),
    ],
)
def test_matches_and_f1_over_words(answer, expected, f1, same, quasi):
    assert words.token_f1(answer, expected) == pytest.approx(f1)
    assert words.exact_match(answer, expected) == same
    assert words.quasi_exact_match(answer, expected) == quasi


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("It is 1,200 mg a day.", "1200", 1),
        ("First 3, then 4.50", "4.5", 1),
        ("about -2", "2", 0),
        ("1.5e-3", "0.0015", 1),
        ("none", "3", 0),
        ("3 or 4", "3", 0),
    ],
)
def test_the_last_numbers_are_compared(answer, expected, same):
    assert words.number_match(answer, expected) == same


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I cannot help with that.", 1),
        ("As an AI language model, I have no body.", 1),
        ("I can’t provide a diagnosis.", 1),
        ("See the heart ward: fever.", 0),
        ("Patients cannot help coughing.", 0),
    ],
)
def test_refusals_are_told_from_answers(answer, refuses):
    assert words.refuses(answer) == refuses


def test_the_best_of_several_references_counts():
    assert words.best(words.exact_match, "lung", ["heart", "lung"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("10-20", "20", 1),
        ("grade 2-3", "3", 1),
        ("COVID-19", "19", 1),
        ("\N{MINUS SIGN}3", "-3", 1),
        ("-3", "3", 0),
        ("x=-3", "-3", 1),
        ("(-.5)", "-0.5", 1),
        ("1e-5", "0.00001", 1),
    ],
)
def test_a_dash_between_numbers_is_no_sign(answer, expected, same):
    assert words.number_match(answer, expected) == same


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry to hear that you have a fever. Drink water.", 0),
        ("I am sorry that you feel ill. Rest.", 0),
        ("I'm sorry, but that is nothing for me.", 1),
        ("I’m sorry to hear that. I can't help with it.", 1),
    ],
)
def test_compassion_is_no_refusal(answer, refused):
    assert words.refuses(answer) == refused
