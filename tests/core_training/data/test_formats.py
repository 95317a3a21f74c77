"""Every layout that people's files have says the same thing, and what is wrong in a record is said of that record."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.data.formats import known_columns, read_values
from core_training.data.records import Record, read_records
from core_training.foundation.errors import InputError
from tests import tiny

LLAMA_FACTORY = Path(__file__).parents[4] / "shared" / "data" / "llamafactory"


def values(stage: str, columns: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    return tiny.said(read_values(Record(fields, Path("a.jsonl"), 7), stage, columns or {}))


def identity(stage: str, columns: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    return read_values(Record(fields, Path("a.jsonl"), 7), stage, columns or {}).identity


def error(stage: str, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        values(stage, **fields)
    place, _, message = str(caught.value).partition(": ")
    assert place == "a.jsonl, line 7"
    return message


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [user("why?"), assistant("because")]},
        {"prompt": "why?", "completion": "because"},
        {"prompt": [user("why?")], "completion": [assistant("because")]},
        {"prompt": "why?", "completion": assistant("because")},
        {"instruction": "why?", "output": "because"},
        {"instruction": "why?", "input": "", "output": "because", "system": None, "history": []},
        {"conversations": [human("why?"), gpt("because")]},
        {"conversations": [user("why?"), assistant("because")], "system": ""},
    ],
)
def test_a_conversation_is_the_same_in_every_layout(fields: dict[str, Any]) -> None:
    assert values("sft", **fields) == {"messages": [user("why?"), assistant("because")]}
    assert identity("sft", **fields) == {"prompt": "why?", "completion": "because"}
    for name in ("label", "kto_tag"):
        marked = values("kto", **fields, **{name: False})
        assert marked == {"prompt": [user("why?")], "completion": [assistant("because")], "label": False}
        assert identity("kto", **fields, **{name: False}) == {"prompt": "why?", "completion": "because", "label": False}
    assert values("ppo", **fields) == {"prompt": [user("why?")]}
    assert identity("ppo", **fields) == {"prompt": "why?"}


def test_alpaca_has_a_system_text_an_input_and_a_history() -> None:
    fields = {"instruction": "Add.", "input": "1 2", "system": "Be brief.", "history": [["0 0", "0"], ["0 1", "1"]]}
    turns = [SYSTEM, user("0 0"), assistant("0"), user("0 1"), assistant("1"), user("Add.\n1 2")]
    assert values("sft", **fields, output="3")["messages"] == [*turns, assistant("3")]
    assert values("grpo", **fields) == {"prompt": turns}
    pair = values("dpo", **fields, chosen="3", rejected="4")
    assert pair == {"prompt": turns, "chosen": [assistant("3")], "rejected": [assistant("4")]}


@pytest.mark.parametrize("stage", ["reward", "dpo", "orpo", "simpo"])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "why?", "chosen": "because", "rejected": "no"},
        {"prompt": [user("why?")], "chosen": [assistant("because")], "rejected": [assistant("no")]},
        {"prompt": "why?", "chosen": [user("why?"), assistant("because")], "rejected": [user("why?"), assistant("no")]},
        {"chosen": [user("why?"), assistant("because")], "rejected": [user("why?"), assistant("no")]},
        {"conversations": [human("why?")], "chosen": gpt("because"), "rejected": gpt("no")},
        {"messages": [user("why?")], "chosen": assistant("because"), "rejected": assistant("no")},
        {"instruction": "why?", "input": "", "chosen": "because", "rejected": "no"},
        {"chosen": "\n\nHuman: why?\n\nAssistant: because", "rejected": "\n\nHuman: why?\n\nAssistant: no"},
    ],
)
def test_a_pair_is_the_same_in_every_layout(stage: str, fields: dict[str, Any]) -> None:
    pair = {"prompt": [user("why?")], "chosen": [assistant("because")], "rejected": [assistant("no")]}
    assert values(stage, **fields) == pair
    assert values(stage, **fields, margin="1.5") == {**pair, "margin": 1.5}
    for margin in ({}, {"margin": "1.5"}):
        assert identity(stage, **fields, **margin) == {"prompt": "why?", "chosen": "because", "rejected": "no"}


@pytest.mark.parametrize(("longer", "shorter"), [("chosen", "rejected"), ("rejected", "chosen")])
def test_of_two_conversations_of_which_one_goes_on_both_keep_an_answer(longer: str, shorter: str) -> None:
    start = [SYSTEM, user("why?"), assistant("because")]
    pair = values("dpo", **{longer: [*start, user("and?"), assistant("so")], shorter: start})
    assert pair["prompt"] == [SYSTEM, user("why?")]
    assert pair[shorter] == [assistant("because")]
    assert pair[longer] == [assistant("because"), user("and?"), assistant("so")]


@given(
    st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3),
)
def test_prompt_and_answers_make_up_the_conversations_again(first: list[str], second: list[str]) -> None:
    def conversation(texts: list[str]) -> list[dict[str, str]]:
        return [turn for text in texts for turn in (user("?"), assistant(text))]

    chosen, rejected = conversation(first), conversation(second)
    if first == second:
        assert "the same answer" in error("dpo", chosen=chosen, rejected=rejected)
        return
    pair = values("dpo", chosen=chosen, rejected=rejected)
    assert pair["prompt"] + pair["chosen"] == chosen
    assert pair["prompt"] + pair["rejected"] == rejected
    assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"


@pytest.mark.parametrize(("written", "label"), [(True, True), ("true", True), ("False", False), (" TRUE ", True)])
def test_a_label_may_come_as_text(written: Any, label: bool) -> None:
    assert values("kto", prompt="why?", completion="because", label=written)["label"] is label


def test_only_the_last_answer_of_a_conversation_is_marked() -> None:
    turns = [user("why?"), assistant("because"), user("and?"), assistant("so")]
    assert values("kto", messages=turns, label=True) == {
        "prompt": turns[:3],
        "completion": turns[3:],
        "label": True,
    }


def test_renamed_columns_are_found_and_go_before_others() -> None:
    columns = {"instruction": "question", "output": "answer"}
    fields = {"question": "why?", "answer": "because", "prompt": "x", "completion": "y"}
    assert values("sft", columns, **fields)["messages"] == [user("why?"), assistant("because")]
    assert values("sft", **fields)["messages"] == [user("x"), assistant("y")]


def test_what_is_held_out_is_decided_on_what_a_record_says() -> None:
    """These are fixed for good: another identity moves records between training and evaluation."""
    columns = {"prompt": "question", "completion": "answer"}
    assert identity("sft", columns, question="why?", answer="b", id=3) == {"prompt": "why?", "completion": "b"}
    assert identity("pretrain", text="some", id=3) == {"text": "some"}
    for talk in ([SYSTEM, user("why?"), assistant("b")], [assistant("b")], [user("a"), assistant("b"), user("c")]):
        assert identity("sft", messages=talk, id=3) == {"messages": talk}
    turns = [SYSTEM, user("why?")]
    assert identity("grpo", instruction="why?", system="Be brief.") == {"prompt": turns}
    pair = identity("dpo", prompt=turns, chosen="b", rejected=[assistant("c"), user("d"), assistant("e")])
    assert pair == {"prompt": turns, "chosen": "b", "rejected": [assistant("c"), user("d"), assistant("e")]}


@pytest.mark.parametrize(
    ("stage", "fields", "fitting"),
    [
        ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "reward, dpo, orpo, simpo"),
        ("dpo", {"prompt": "a", "completion": "b"}, "sft"),
        ("kto", {"text": "a"}, "pretrain"),
        ("pretrain", {"prompt": "a", "completion": "b", "label": True}, "kto"),
        ("sft", {"prompt": "a"}, "ppo, rloo, grpo"),
    ],
)
def test_wrong_columns_name_what_is_needed_what_is_there_and_which_stage_fits(
    stage: str, fields: dict[str, Any], fitting: str
) -> None:
    message = error(stage, **fields)
    assert message.startswith(f"stage {stage} needs ")
    assert f"the record has {', '.join(fields)}. These columns fit stage {fitting}; or map names" in message


def test_columns_that_no_stage_reads_are_named_too() -> None:
    assert error("pretrain", body="a") == "stage pretrain needs text; the record has body. Map names with data.columns"


@pytest.mark.parametrize(
    ("stage", "fields", "expected"),
    [
        ("pretrain", {"text": " "}, "the text is empty or not a string"),
        ("sft", {"prompt": "a", "completion": ""}, "the completion is empty"),
        ("sft", {"prompt": 3, "completion": "b"}, "the prompt is empty or not a string"),
        ("sft", {"prompt": [], "completion": "b"}, "'prompt' must be a list"),
        ("sft", {"prompt": [user("a"), assistant("b")], "completion": "c"}, "the prompt ends with an assistant's turn"),
        ("sft", {"messages": [user("a"), assistant("")]}, "an assistant's turn in 'messages' is empty"),
        ("sft", {"messages": [user("a")]}, "'messages' must be a list of {role, content} with an assistant's turn"),
        (
            "sft",
            {"conversations": [human("a"), {"from": "function_call", "value": "f"}]},
            "a function call in 'conversations' is not JSON",
        ),
        ("sft", {"instruction": " ", "output": "b"}, "the instruction is empty"),
        *(
            ("sft", {"instruction": "a", "output": "b", "history": wrong}, "'history' must be a list of pairs")
            for wrong in (["a"], 5, True, "a", {"a": "b"}, [["a", "b"], ["a"]])
        ),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same answer"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": " "}, "the rejected is empty"),
        ("dpo", {"prompt": " ", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
        ("dpo", {"prompt": "a", "chosen": [user("x"), assistant("b")], "rejected": "c"}, "the chosen begins with"),
        ("dpo", {"chosen": "b", "rejected": "c"}, "chosen is a text without a prompt; give a column 'prompt'"),
        ("dpo", {"chosen": [assistant("b")], "rejected": [assistant("c")]}, "do not begin with the same turns"),
        *(
            (
                "dpo",
                {"prompt": "a", "chosen": "b", "rejected": "c", "margin": wrong},
                "the margin must be a number from",
            )
            for wrong in ("wide", 10**400, -1e7, float("nan"), float("inf"), True, [1])
        ),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}, "the label must be true or false"),
        ("kto", {"prompt": "a", "completion": "b", "label": "good"}, "the label must be true or false"),
        ("kto", {"messages": [assistant("a")], "label": True}, "the prompt is empty"),
        (
            "kto",
            {"messages": [user("a"), assistant("b"), user("c")], "label": True},
            "does not end with an assistant's",
        ),
        ("ppo", {"messages": [assistant("a")]}, "the prompt is empty"),
    ],
)
def test_what_is_wrong_in_a_record_is_named(stage: str, fields: dict[str, Any], expected: str) -> None:
    assert expected in error(stage, **fields)


@given(
    st.sampled_from(["pretrain", "sft", "dpo", "kto", "ppo"]),
    st.dictionaries(
        st.sampled_from(
            sorted({name for stage in ("pretrain", "sft", "dpo", "kto", "ppo") for name in known_columns(stage)})
        ),
        st.recursive(
            st.none() | st.booleans() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": inner})
            ),
            max_leaves=6,
        ),
    ),
)
def test_any_record_is_read_or_refused_by_name(stage: str, fields: dict[str, Any]) -> None:
    with suppress(InputError):
        read = values(stage, **fields)
        answers = [turn for name in ("chosen", "rejected", "completion") for turn in read.get(name, [])]
        assert all(turn["content"].strip() for turn in answers if turn["role"] == "assistant")


@pytest.mark.skipif(not LLAMA_FACTORY.is_dir(), reason="the real data are not here")
@pytest.mark.parametrize(("name", "stage", "count"), [("alpaca", "sft", 999), ("dpo", "dpo", 200), ("kto", "kto", 200)])
def test_llama_factorys_own_examples_are_read_whole(name: str, stage: str, count: int) -> None:
    read = [tiny.said(read_values(r, stage, {})) for r in read_records(LLAMA_FACTORY / f"{name}_en_demo.json.gz")]
    assert len(read) == count
    for one in read:
        before = one.get("prompt") or one["messages"][:-1]
        assert before[-1]["role"] == "user"


CALL = {"type": "function", "function": {"name": "dose_of", "arguments": {"drug": "x"}}}
TOOL = {"type": "function", "function": {"name": "dose_of", "parameters": {}}}


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("sft", {"messages": [user("q"), assistant("a")]}),
        ("sft", {"prompt": "q", "completion": "a"}),
        ("sft", {"conversations": [human("q"), gpt("a")]}),
        ("sft", {"instruction": "q", "output": "a"}),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("dpo", {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": "b"}),
        ("dpo", {"messages": [user("q")], "chosen": "a", "rejected": "b"}),
        ("dpo", {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}),
        ("kto", {"prompt": "q", "completion": "a", "label": True}),
        ("grpo", {"prompt": "q"}),
        ("grpo", {"messages": [user("q")]}),
    ],
)
def test_a_system_text_in_a_column_of_its_own_goes_before_the_turns(stage: str, fields: dict[str, Any]) -> None:
    said = values(stage, system="Be brief.", **fields)
    assert (said.get("messages") or said["prompt"])[:2] == [SYSTEM, user("q")]
    assert "system" not in str(values(stage, **fields))


def test_two_system_texts_are_refused() -> None:
    assert "stands in the column 'system' and among the turns" in error(
        "sft", system="Be long.", messages=[SYSTEM, user("q"), assistant("a")]
    )


@pytest.mark.parametrize(
    "turns",
    [
        [user("q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [user("q"), {"role": "assistant", "tool_calls": [{"name": "dose_of", "arguments": '{"drug": "x"}'}]}],
        [human("q"), {"from": "function_call", "value": '{"name": "dose_of", "arguments": {"drug": "x"}}'}],
    ],
)
def test_a_call_is_the_same_in_every_layout(turns: list[dict[str, Any]]) -> None:
    said = values("sft", messages=turns, tools=[{"name": "dose_of", "parameters": {}}])
    assert said["messages"] == [user("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert said["tools"] == [TOOL]


def test_content_in_parts_and_thoughts_are_kept() -> None:
    parts = [{"type": "text", "text": "Fe"}, {"type": "text", "text": "ver"}]
    said = values("sft", messages=[user("q"), {"role": "assistant", "content": parts, "thinking": "Hm."}])
    assert said["messages"][1] == {"role": "assistant", "content": "Fever", "reasoning_content": "Hm."}


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_turn_may_say_that_it_is_not_to_be_learnt(key: str) -> None:
    turns = [user("q"), {**assistant("wrong"), key: 0}, user("r"), {**assistant("right"), key: 1}]
    assert values("sft", messages=turns)["messages"][1]["learnt"] is False
    assert "learnt" not in values("sft", messages=turns)["messages"][3]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [user("q"), {**assistant("a"), "weight": 0.5}]}, "weight, train or loss other than 0 and 1"),
        ({"messages": [user("q"), {**assistant("a"), "weight": 0, "train": True}]}, "other than 0 and 1"),
        ({"messages": [{**user("q"), "images": ["x.png"]}, assistant("a")]}, "has 'images', which cannot be used"),
        ({"messages": [user("q"), assistant("a")], "images": ["x.png"]}, "the column 'images' cannot be used"),
        ({"messages": [user("q"), assistant("a")], "chat_template_kwargs": {"x": 1}}, "cannot be used"),
        ({"messages": [user("q"), {"role": "assistant", "tool_calls": "f(x)"}]}, "tool_calls that are no list"),
        ({"messages": [user("q"), assistant("a")], "tools": "f(x)"}, "'tools' is a text that is not JSON"),
        ({"messages": [user("q"), assistant("a")], "tools": [{"type": "function"}]}, "each with a name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}, assistant("a")]},
            "parts that are no texts",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_and_not_passed_over(fields: dict[str, Any], expected: str) -> None:
    assert expected in error("sft", **fields)


CALLED = '{"name": "f", "arguments": %s}'


@pytest.mark.parametrize("depth", [100, 100_000])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (lambda deep: {"prompt": "q", "completion": "a", "tools": deep}, "'tools' is a text that is not JSON"),
        (
            lambda deep: {"conversations": [human("q"), {"from": "function_call", "value": CALLED % deep}]},
            "is not JSON",
        ),
        (
            lambda deep: {
                "messages": [user("q"), {"role": "assistant", "tool_calls": json.loads(CALLED % f'"{deep}"')}]
            },
            "tool_calls that are no list",
        ),
    ],
    ids=["tools", "ShareGPT's call", "arguments"],
)
def test_json_inside_a_record_is_nested_no_deeper_than_others(
    fields: Callable[[str], dict[str, Any]], expected: str, depth: int
) -> None:
    assert expected in error("sft", **fields("[" * depth + "]" * depth))


def test_columns_that_are_read_under_another_name_are_not_refused_by_it() -> None:
    said = values("sft", {"tools": "functions", "prompt": "documents"}, documents="q", completion="a", functions=[TOOL])
    assert (said["messages"][0], said["tools"]) == (user("q"), [TOOL])


def test_marks_of_what_is_learnt_make_no_pair_of_two_answers() -> None:
    turns = [user("q"), assistant("a")]
    marked = [user("q"), {**assistant("a"), "weight": 0}]
    assert "the same answer" in error("dpo", chosen=marked, rejected=turns)
    assert "marked as not to be learnt" in error(
        "dpo", prompt="q", chosen=[{**assistant("a"), "weight": 0}], rejected="b"
    )
