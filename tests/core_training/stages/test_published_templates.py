"""Every template that TRL ships, under conversations of every kind: what is printed, learnt and refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.data.examples import IGNORED
from core_training.data.folding import folded, unwrapped
from core_training.data.reasoning import with_reasoning, with_thoughts_apart
from core_training.models.chat_template import (
    ChatTemplate,
    named_template,
    standing_clock,
    template_names,
    training_template,
)
from core_training.parts.data_kinds.values import Conversation, Messages, PreferencePair
from tests.templates import KINDS, Published, page, words

PAGE = Path(__file__).parents[3] / "docs" / "templates.md"
PUBLISHED = {name: Published(name) for name in template_names()}


def test_the_page_is_what_the_command_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_learnt_is_what_the_assistant_says_and_nothing_of_others(name: str) -> None:
    """Read on the decoded text alone, without anything of what found the labels."""
    read = {kind: PUBLISHED[name].read(kind) for kind in KINDS}
    assert not {"plain", "two answers", "system"} & {kind for kind in read if read[kind].tokens is None}
    for kind, reading in read.items():
        if reading.tokens is None:
            continue
        messages, rest = KINDS[kind].messages, reading.learnt
        for word in words(messages):
            assert word in rest, (kind, reading.learnt)
            rest = rest.partition(word)[2]
        for message in messages:
            assert message["content"] in reading.text
            assert message["role"] == "assistant" or message["content"] not in reading.learnt
        closes = PUBLISHED[name].template.turn_end is not None
        assert reading.tokens.ends_with(PUBLISHED[name].ends) is closes, (kind, reading.learnt)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if training_template(named_template(name) or "")])
def test_labels_are_the_marks_of_the_template_for_training(name: str) -> None:
    """transformers reads TRL's marks; that is how TRL's own trainer finds what the assistant says."""
    from trl.chat_template_utils import get_training_chat_template

    template = PUBLISHED[name].template
    own = named_template(name) or ""
    if training_template(own) == own:
        return
    for_training = get_training_chat_template(template.tokenizer)
    assert for_training == training_template(own)
    assert for_training is not None
    for kind, said in KINDS.items():
        tokens = PUBLISHED[name].read(kind).tokens
        if tokens is None:
            continue
        told = folded(said, system=not template.takes_system, repeats=not template.takes_repeats)
        parts: Any = told.messages
        if "%}<image>" in own or "<image>" in own:  # templates of models of images
            parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in told.messages]
        tools: Any = list(told.tools or []) or None
        marked: Any = template.tokenizer.apply_chat_template(
            parts,
            tools=tools,
            chat_template=standing_clock(for_training, date(2025, 1, 1)),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert tokens.input_ids.tolist() == marked["input_ids"], kind
        ours, theirs = tokens.labels != IGNORED, np.array(marked["assistant_masks"], dtype=bool)
        assert not (ours & ~theirs).any(), kind
        # TRL also learns what the template says before each answer, where its marks begin there.
        spared = template.tokenizer.decode(tokens.input_ids[theirs & ~ours])
        said = template.opening.replace("\n", "")
        assert set(spared.replace("\n", "").replace(said, "")) <= set(said), (kind, spared)


def test_thoughts_that_are_printed_in_the_last_turn_alone_are_kept_there() -> None:
    for published in PUBLISHED.values():
        if published.read("thought").tokens is None or published.read("two thoughts").tokens is not None:
            continue
        kept = with_reasoning(KINDS["two thoughts"], "last")
        reading = published.read_values(kept)
        assert reading.tokens is not None, published.name
        assert "Thought two." in reading.learnt
        assert "Thought one." not in reading.text


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_a_template_that_reads_the_clock_gives_the_same_tokens_on_every_day(name: str) -> None:
    template = PUBLISHED[name].template
    said = KINDS["plain"].messages
    text = template.text(said)
    assert text == ChatTemplate(template.tokenizer, date(2025, 1, 1)).text(said)
    other = ChatTemplate(template.tokenizer, date(2026, 3, 4))
    assert other.text(said) != text
    assert other.digest != template.digest
    today = date.today().isoformat()
    assert today not in text
    assert today not in other.text(said)


def test_a_clock_that_stands_still_prints_what_a_running_one_would() -> None:
    day = date(2026, 3, 4)
    for form in ("%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %H:%M"):
        still = ChatTemplate(_with_template("\n{{ strftime_now('" + form + "') }}"), day).text(TURNS)
        assert still == "\n" + day.strftime(form).replace("%H:%M", "00:00")


def _with_template(source: str) -> Any:
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return tokenizer


TURNS: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "One."},
    {"role": "assistant", "content": "Two.", "learnt": False},
]


def test_turns_that_a_template_does_not_take_are_folded_as_little_as_needed() -> None:
    said = Conversation(TURNS)
    assert folded(said, system=False, repeats=False) is said
    both = folded(said, system=True, repeats=True).messages
    assert [turn["content"] for turn in both] == ["Be brief.\n\nOne?\n\nTwo?", "One.", "Two."]
    assert folded(said, system=True, repeats=False).messages[0] == {"role": "user", "content": "Be brief.\n\nOne?"}
    pair = PreferencePair(TURNS[:2], [{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": "B"}])
    assert folded(pair, system=True, repeats=True) == replace(
        pair, prompt=[{"role": "user", "content": "Be brief.\n\nOne?"}]
    )


def test_turns_that_call_functions_are_not_joined() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    said = Conversation([{"role": "user", "content": "One?"}, call, call])
    assert folded(said, system=True, repeats=True) is said


def test_labels_do_not_depend_on_how_often_a_template_was_looked_at() -> None:
    first = PUBLISHED["qwen3"].read("tools")
    again = Published("qwen3").read("tools")
    assert first.tokens is not None
    assert again.tokens is not None
    np.testing.assert_array_equal(first.tokens.labels, again.tokens.labels)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "diffusion_gemma", "glm4moe", "nemotron_3_nano"])
def test_a_template_that_is_nearly_a_published_one_is_read_without_its_marks(name: str) -> None:
    """People change a line of a template: what TRL knows of it is then of no use, and turns are found by themselves."""
    known = PUBLISHED[name]
    tokenizer = known.template.tokenizer
    changed = Published(name)
    changed.__dict__["template"] = ChatTemplate(_copy_with(tokenizer, (named_template(name) or "") + "{# ours #}"), DAY)
    for kind in ("two answers", "tools", "thought", "begins with an answer"):
        reading = changed.read(kind)
        assert reading.tokens is not None, (kind, reading.refusal)
        for word in words(KINDS[kind].messages):
            assert word in reading.learnt, (kind, reading.learnt)
        for message in KINDS[kind].messages:
            assert message["role"] == "assistant" or message["content"] not in reading.learnt, (kind, reading.learnt)


DAY = date(2025, 1, 1)


def _copy_with(tokenizer: Any, template: str) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_turn_of_several_is_learnt_alone(name: str) -> None:
    """Some templates mark several pieces of a turn, or one behind the last."""
    turns = [dict(turn) for turn in KINDS["two answers"].messages]
    for number, spared, learnt in ((1, "Answer one.", "Answer two."), (3, "Answer two.", "Answer one.")):
        some = [{**turn, "learnt": False} if index == number else turn for index, turn in enumerate(turns)]
        reading = PUBLISHED[name].read_values(Conversation(some))
        assert reading.tokens is not None, reading.refusal
        assert learnt in reading.learnt
        assert spared not in reading.learnt
        assert "Question" not in reading.learnt


def test_marks_in_a_macro_are_not_believed() -> None:
    """transformers reports them where the macro begins."""
    said = (
        "{% macro say(m) %}<|assistant|>{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endmacro %}"
    )
    talk = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}{{ say(m) }}{% endif %}"
    macro = Published("macro")
    macro.__dict__["template"] = ChatTemplate(_with_template(f"{said}{talk}{{% endfor %}}"), DAY)
    reading = macro.read("two answers")
    assert reading.tokens is not None
    assert "Answer one.<|eos|>" in reading.learnt
    assert "Answer two.<|eos|>" in reading.learnt
    assert "Question" not in reading.learnt


@pytest.mark.parametrize("form", ["%F", "%e %B", "%D", "%-H:%M", "%%d", "%j", "%T"])
def test_a_clock_knows_every_directive(form: str) -> None:
    still = ChatTemplate(_with_template("{{ strftime_now('" + form + "') }}"), DAY)
    assert still.text(TURNS) == DAY.strftime(form)


def test_a_tokenizer_with_templates_for_tools_alone_has_none_for_others() -> None:
    tokenizer = _with_template("")
    tokenizer.chat_template = {"tool_use": "{{ tools | tojson }}"}
    template = ChatTemplate(tokenizer, DAY)
    assert (template.exists, template.turn_end, template.takes_system, template.takes_repeats) == (
        False,
        None,
        True,
        True,
    )


@pytest.mark.parametrize("blanks", [" {}", "\n{}\n", "  {} "])
def test_blanks_around_answers_change_nothing_of_what_is_learnt(blanks: str) -> None:
    for name, published in PUBLISHED.items():
        for kind in ("two answers", "system"):
            turns = [dict(turn) for turn in KINDS[kind].messages]
            for turn in turns:
                if turn["role"] == "assistant":
                    turn["content"] = blanks.format(turn["content"])
            reading = published.read_values(replace(KINDS[kind], messages=turns))
            assert reading.tokens is not None, (name, kind, reading.refusal)
            first, found, rest = reading.learnt.partition("Answer one.")
            assert found, (name, kind, reading.learnt)
            assert "Answer two." in rest, (name, kind, reading.learnt)
            assert "Question" not in first + rest, (name, kind, reading.learnt)


OLD_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)


def test_an_old_template_of_mistrals_takes_system_texts_and_turns_in_a_row() -> None:
    old = Published("mistral")
    old.__dict__["template"] = ChatTemplate(_with_template(OLD_MISTRAL), DAY)
    cells = {kind: old.read(kind).cell for kind in KINDS}
    assert (cells["two answers"], cells["system"], cells["answers in a row"]) == ("learnt", "learnt¹", "learnt¹")
    assert "[INST] Be brief.\n\nQuestion one? [/INST]" in old.read("system").text


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_that_the_prompt_says_is_learnt(name: str) -> None:
    template, reading = PUBLISHED[name].template, PUBLISHED[name].read("plain")
    assert reading.tokens is not None
    prompt = template.text(KINDS["plain"].messages[:1], to_answer=True)
    first = int((reading.tokens.labels != IGNORED).argmax())
    before = str(template.tokenizer.decode(reading.tokens.input_ids[:first]))
    if reading.text.startswith(prompt):  # some open a thought there that a plain conversation does not have
        assert len(before) >= len(prompt), (before, prompt)


THINKING = ["qwen3", "qwen3_8", "qwen3_5_think", "glm4moe", "gptoss", "muse_glimmer", "gemma4_v5"]


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_before_the_words_is_read_as_one_apart(name: str) -> None:
    apart, written = KINDS["thought"], [dict(turn) for turn in KINDS["thought"].messages]
    written[1]["content"] = f"<think>{written[1].pop('reasoning_content')}</think>{written[1]['content']}"
    assert PUBLISHED[name].template.takes_thoughts
    inline = with_thoughts_apart(replace(apart, messages=written))
    assert PUBLISHED[name].read_values(inline).learnt == PUBLISHED[name].read("thought").learnt


def test_what_hermes_data_have_written_out_is_not_written_twice() -> None:
    said = KINDS["tools"]
    turns = [{"role": "system", "content": "You have <tools>dose</tools>."}, *(dict(turn) for turn in said.messages)]
    turns[3]["content"] = "<tool_response>\n100 mg\n</tool_response>"
    template = PUBLISHED["qwen3"].template
    assert template.wraps_results
    told = unwrapped(replace(said, messages=turns))
    assert told.tools is None
    text = PUBLISHED["qwen3"].read_values(told).text
    assert text.count("<tool_response>") == 1
    assert "# Tools" not in text
    assert unwrapped(said) is said
    assert not PUBLISHED["llama3_1"].template.wraps_results


def test_letters_for_private_use_are_letters() -> None:
    """Texts from PDFs have them."""
    turns = [dict(turn) for turn in KINDS["two answers"].messages]
    turns[0]["content"] = "\ue000 first point?"
    turns[1]["learnt"] = False
    for published in PUBLISHED.values():
        reading = published.read_values(Conversation(turns))
        assert reading.tokens is not None, (published.name, reading.refusal)
        assert "Answer one." not in reading.learnt
        assert "Answer two." in reading.learnt


def test_a_tokenizer_whose_file_says_to_cut_and_to_pad_does_neither() -> None:
    tokenizer = _with_template("{{ messages[0].content }}")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    encoding = ChatTemplate(tokenizer, DAY).encoding("one two three four five six seven")
    assert tokenizer.decode(encoding.ids) == "one two three four five six seven"
