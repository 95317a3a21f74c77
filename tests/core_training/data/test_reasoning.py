"""Thoughts before an assistant's words."""

from __future__ import annotations

import pytest

from core_training.data.reasoning import with_reasoning
from core_training.parts.data_kinds.values import Conversation, PreferencePair, Text
from core_training.recipe.schema import Reasoning

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
    ("content", "left"), [("Hm.\n</think>\nYes", "Yes"), ("<think>a</think><think>b</think>No", "<think>b</think>No")]
)
def test_a_thought_whose_beginning_the_prompt_had_is_left_out_too(content: str, left: str) -> None:
    if "<think>" in left:
        with pytest.raises(ValueError, match="a thought without an end"):
            with_reasoning(Conversation([ASKED, said(content)]), "drop")
    else:
        assert with_reasoning(Conversation([ASKED, said(content)]), "drop").messages[1] == said(left)


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
