"""Thoughts before an assistant's words."""

from __future__ import annotations

import pytest

from core_training.data.reasoning import with_reasoning, with_thoughts_apart
from core_training.parts.data_kinds.values import Conversation, PreferencePair, Text
from core_training.recipe.sections.data import Reasoning

THOUGHT = "<think>\nHm.\n</think>\n\n"


def said(content: str, reasoning: str | None = None) -> dict[str, str]:
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


ASKED = {"role": "user", "content": f"{THOUGHT}Why?"}


@pytest.mark.parametrize(
    ("kept", "first", "last"),
    [
        ("keep", said(THOUGHT + "One."), said("Two.", "Hm.")),
        ("drop", said("One."), said("Two.")),
        ("last", said("One."), said("Two.", "Hm.")),
    ],
)
def test_thoughts_are_kept_left_out_or_kept_in_the_last_turn(kept: Reasoning, first: object, last: object) -> None:
    values = Conversation([ASKED, said(THOUGHT + "One."), ASKED, said("Two.", "Hm.")])
    assert with_reasoning(values, kept).messages == [ASKED, first, ASKED, last]


def test_of_a_pair_the_answers_are_the_last_turns() -> None:
    pair = PreferencePair([ASKED, said("One.", "Hm."), ASKED], [said(THOUGHT + "Two.")], [said("No.", "Hm.")])
    last = with_reasoning(pair, "last")
    assert last.prompt[1] == said("One.")
    assert (last.chosen, last.rejected) == (pair.chosen, pair.rejected)
    assert with_reasoning(pair, "drop").chosen == [said("Two.")]


def test_a_text_has_none() -> None:
    assert with_reasoning(Text(THOUGHT), "drop") == Text(THOUGHT)


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("Hm.\n</think>\nYes", "Yes"),
        ("<think>a</think><think>b</think>No", "No"),
        ("Use <think> and </think> tags.", "Use <think> and </think> tags."),
        ("Write </think> to close.", "Write </think> to close."),
    ],
)
def test_thoughts_at_the_beginning_alone_are_left_out(content: str, left: str) -> None:
    """Also one whose beginning the prompt had; an answer that speaks of the marks stays."""
    assert with_reasoning(Conversation([ASKED, said(content)]), "drop").messages[1] == said(left)


@pytest.mark.parametrize(
    ("content", "thought", "words"),
    [
        ("<think>T one</think>A one", "T one", "A one"),
        ("<think>\nT one\n</think>\n\nA one", "T one", "A one"),
        ("Use <think> and </think> tags.", None, "Use <think> and </think> tags."),
        ("<think>\n\n</think>\n\nA one", None, "<think>\n\n</think>\n\nA one"),
        ("<think>T one</think>", None, "<think>T one</think>"),
    ],
)
def test_a_thought_before_the_words_is_put_apart(content: str, thought: str | None, words: str) -> None:
    assert with_thoughts_apart(Conversation([ASKED, said(content)])).messages == [ASKED, said(words, thought)]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (Conversation([ASKED, said("<think>cut off")]), "a thought without an end"),
        (Conversation([ASKED, said("<think>Hm.</think>")]), "nothing but a thought"),
        (
            PreferencePair([ASKED], [said("<think>a</think>Yes")], [said("<think>b</think>Yes")]),
            "the same answer; a pair must differ",
        ),
    ],
)
def test_what_is_nothing_without_its_thoughts_is_refused(values: Conversation, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        with_reasoning(values, "drop")
