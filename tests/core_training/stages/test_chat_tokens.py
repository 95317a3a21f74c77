"""Labels under a chat template: on what the assistant says, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from core_training.data.examples import IGNORED, Tokens
from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.chat_template import ChatTemplate
from core_training.recipe.schema import Recipe
from core_training.stages.chat import answer_tokens, conversation_tokens, prompt_tokens
from tests.tiny import CHAT_TEMPLATE

MakeRecipe = Callable[..., Recipe]
RECORD = Record({}, Path("talk.jsonl"), 7)

TALK = [
    {"role": "user", "content": "Fever of the heart?"},
    {"role": "assistant", "content": "See the heart ward."},
    {"role": "user", "content": "And the lung?"},
    {"role": "assistant", "content": " Yes, that too. "},
]
UNMARKED = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Roles in words, which run into the text around them, and a line break after each turn.
WORDY = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As Qwen 3 does: an empty thought before the last answer only.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] + eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As DeepSeek R1 does: the generation prompt opens a thought that the conversation does not have.
OPENED = UNMARKED.replace("%}<|assistant|>{% endif %}", "%}<|assistant|><think>\n{% endif %}")
assert OPENED != UNMARKED
# As some of TRL's do: the mark begins before what the generation prompt already says.
HEADED = CHAT_TEMPLATE.replace("<|assistant|>{% generation %}", "{% generation %}<|assistant|>")
# As Phi 3 does: a token that closes the whole conversation, whose first letters are also those of a header.
CLOSED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|eos|>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return BaseModel(Recipe.model_validate({"model": {"name_or_path": str(tiny_model)}, "stage": "sft"}))


def learnt(tokens: Tokens, base: BaseModel) -> str:
    return base.tokenizer.decode(tokens.input_ids[tokens.labels != IGNORED])


def test_marked_and_unmarked_templates_give_the_same_labels(base: BaseModel) -> None:
    base.tokenizer.chat_template = CHAT_TEMPLATE
    marked = conversation_tokens(TALK, base, RECORD)
    base.tokenizer.chat_template = UNMARKED
    unmarked = conversation_tokens(TALK, base, RECORD)
    assert marked.input_ids.tolist() == unmarked.input_ids.tolist()
    assert marked.labels.tolist() == unmarked.labels.tolist()
    assert learnt(marked, base) == "See the heart ward.<|eos|> Yes, that too. <|eos|>"


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, UNMARKED, OPENED, HEADED], ids=["marked", "unmarked", "opened", "headed"]
)
def test_only_the_answer_is_labelled_when_the_assistant_spoke_before(base: BaseModel, template: str) -> None:
    base.tokenizer.chat_template = template
    tokens = answer_tokens(TALK[:3], TALK[3:], base, RECORD)
    assert learnt(tokens, base) == " Yes, that too. <|eos|>"
    start = int((tokens.labels != IGNORED).argmax())
    base.tokenizer.chat_template = CHAT_TEMPLATE
    assert tokens.input_ids[:start].tolist() == prompt_tokens(TALK[:3], base, RECORD).input_ids.tolist()


def test_a_turn_of_the_user_inside_an_answer_is_not_labelled(base: BaseModel) -> None:
    base.tokenizer.chat_template = CHAT_TEMPLATE
    tokens = answer_tokens(TALK[:1], TALK[1:], base, RECORD)
    assert learnt(tokens, base) == "See the heart ward.<|eos|> Yes, that too. <|eos|>"


def test_a_token_that_reaches_over_the_start_of_an_answer_is_learnt_with_it(base: BaseModel) -> None:
    """The prompt ends with a space that becomes one token with the answer's first letters: ids are no prefix."""
    base.tokenizer.chat_template = WORDY
    tokens = answer_tokens(TALK[:1], TALK[1:2], base, RECORD)
    prompt = prompt_tokens(TALK[:1], base, RECORD).input_ids.tolist()
    assert tokens.input_ids[: len(prompt)].tolist() != prompt
    assert learnt(tokens, base) == " See the heart ward.\n"


def test_what_only_the_last_turn_is_told_with_is_left_out_of_the_others(base: BaseModel) -> None:
    base.tokenizer.chat_template = THINKING
    tokens = conversation_tokens(TALK, base, RECORD)
    assert learnt(tokens, base) == "See the heart ward.<|eos|>\n<think></think> Yes, that too. <|eos|>\n"


def test_what_closes_the_conversation_is_learnt_at_its_end_alone(base: BaseModel) -> None:
    base.tokenizer.chat_template = CLOSED
    tokens = conversation_tokens(TALK, base, RECORD)
    assert learnt(tokens, base) == "See the heart ward.<|end|>\n Yes, that too. <|end|>\n<|eos|>"


def test_a_template_that_begins_otherwise_with_more_turns_is_read_by_where_it_puts_the_contents(
    base: BaseModel,
) -> None:
    base.tokenizer.chat_template = "{{ messages | length }} turns: " + UNMARKED
    first, second = TALK[-3]["content"], TALK[-1]["content"]
    said = learnt(conversation_tokens(TALK, base, RECORD), base)
    assert (said.count(first.strip()), said.count(second.strip())) == (1, 1)
    assert "<|user|>" not in said


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            UNMARKED.replace("m['content'] +", "(m['content'] if loop.last else '(cut)') +"),
            "does not print message 2",
        ),
        ("{{ messages | map(attribute='content') | join | length }} letters: " + UNMARKED, r"otherwise.*generation %"),
    ],
    ids=["drops earlier answers", "counts letters at its beginning"],
)
def test_a_template_that_tells_a_turn_otherwise_later_is_refused(base: BaseModel, template: str, reason: str) -> None:
    base.tokenizer.chat_template = template
    with pytest.raises(InputError, match=rf"talk.jsonl.*7.*{reason}"):
        conversation_tokens(TALK, base, RECORD)


def test_a_prompt_of_which_the_template_makes_nothing_is_refused(base: BaseModel) -> None:
    base.tokenizer.chat_template = "{% if not add_generation_prompt %}text{% endif %}"
    with pytest.raises(InputError, match=r"talk\.jsonl, line 7: .* does not print message 1"):
        prompt_tokens(TALK[:1], base, RECORD)


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    slow.chat_template = CHAT_TEMPLATE
    monkeypatch.setattr(base, "tokenizer", slow)
    monkeypatch.setattr(base, "chat_template", ChatTemplate(slow, date(2025, 1, 1)))
    with pytest.raises(InputError, match=r"model\.name_or_path: .*save a fast one \(tokenizer\.json\)"):
        conversation_tokens(TALK, base, RECORD)


def test_an_answer_that_ends_in_spaces_does_not_label_what_follows(base: BaseModel) -> None:
    """Tokenizers may leave spaces out of the offsets they report."""
    from tokenizers import processors

    base.tokenizer.chat_template = CHAT_TEMPLATE
    backend = base.tokenizer.backend_tokenizer
    before, backend.post_processor = backend.post_processor, processors.ByteLevel(trim_offsets=True)
    try:
        tokens = conversation_tokens([*TALK, {"role": "user", "content": "Thanks."}], base, RECORD)
    finally:
        backend.post_processor = before or processors.ByteLevel(trim_offsets=False)
    assert learnt(tokens, base) == "See the heart ward.<|eos|> Yes, that too. <|eos|>"


TOOLS = [{"type": "function", "function": {"name": "dose_of", "parameters": {}}}]
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}!{% endif %}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "How much?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "dose_of"}}]},
    {"role": "tool", "content": "5 mg"},
    {"role": "assistant", "content": "Five.", "reasoning_content": "So little?"},
]


def test_calls_and_thoughts_are_learnt_and_results_are_not(base: BaseModel) -> None:
    base.tokenizer.chat_template = CALLING
    tokens = conversation_tokens(CALLS, base, RECORD, TOOLS)
    assert base.tokenizer.decode(tokens.input_ids).startswith('[{"type"')
    assert learnt(tokens, base) == "dose_of!<|eos|>(So little?)Five.<|eos|>"


@pytest.mark.parametrize("template", [CALLING, CHAT_TEMPLATE], ids=["unmarked", "marked"])
def test_a_turn_that_is_not_to_be_learnt_has_no_labels(base: BaseModel, template: str) -> None:
    base.tokenizer.chat_template = template
    turns = [dict(turn) for turn in TALK]
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    answers[0]["learnt"] = False
    said = learnt(conversation_tokens(turns, base, RECORD), base)
    assert answers[0]["content"] not in said
    assert answers[1]["content"] in said


@pytest.mark.parametrize(
    ("left_out", "what"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", "the record's tools"),
        ("{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}!{% endif %}", "the tool_calls of message 2"),
        ("{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}", "the reasoning_content of message 4"),
    ],
)
def test_what_the_template_does_not_print_is_refused(base: BaseModel, left_out: str, what: str) -> None:
    base.tokenizer.chat_template = CALLING.replace(left_out, "")
    with pytest.raises(InputError, match=f"talk.jsonl, line 7: the chat template .* does not print {what}"):
        conversation_tokens(CALLS, base, RECORD, TOOLS)


QWEN = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n<think>\n{% endif %}"
)


def asked_and_said(*answers: str) -> list[dict[str, Any]]:
    return [
        turn
        for answer in answers
        for turn in ({"role": "user", "content": "q"}, {"role": "assistant", "content": answer})
    ]


@pytest.mark.parametrize("answer", ["<5 mg/L", "<think", "e", "end", "|"])
def test_an_answer_is_learnt_whole_whatever_it_begins_with(base: BaseModel, answer: str) -> None:
    """The generation prompt opens a thought, which the conversation does not have."""
    base.tokenizer.chat_template = QWEN
    said = learnt(conversation_tokens(asked_and_said(answer, "Two."), base, RECORD), base)
    assert said == f"{answer}<|end|>\nTwo.<|end|>\n"


def test_one_turn_that_is_found_otherwise_takes_nothing_from_the_others(base: BaseModel) -> None:
    base.tokenizer.chat_template = THINKING
    turns = asked_and_said(" One.", "Two.")
    turns[1:1] = [
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "user", "content": "r"},
    ]
    base.tokenizer.chat_template = QWEN
    said = learnt(conversation_tokens(turns, base, RECORD), base)
    assert said == "Wait.<call>f</call><|end|>\n One.<|end|>\nTwo.<|end|>\n"


def test_a_turn_that_the_template_passes_over_is_missed_though_another_says_the_same(base: BaseModel) -> None:
    base.tokenizer.chat_template = QWEN.replace("messages %}", "messages if m.role != 'tool' %}")
    turns = [
        *asked_and_said("Look."),
        {"role": "tool", "content": "7.4"},
        {"role": "assistant", "content": "It is 7.4"},
    ]
    with pytest.raises(InputError, match=r"does not print message 3 \(of role tool\)"):
        conversation_tokens(turns, base, RECORD)


def test_each_of_several_calls_is_printed_or_the_record_is_refused(base: BaseModel) -> None:
    calls = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    turns = asked_and_said("Look.")
    turns[1]["tool_calls"] = calls
    base.tokenizer.chat_template = QWEN
    assert learnt(conversation_tokens(turns, base, RECORD), base) == "Look.<call>f</call><call>g</call><|end|>\n"
    base.tokenizer.chat_template = QWEN.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(InputError, match="does not print the tool_calls of message 2"):
        conversation_tokens(turns, base, RECORD)


def test_labels_are_of_the_template_for_tools_where_a_model_has_two(base: BaseModel) -> None:
    base.tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools | tojson }}" + CHAT_TEMPLATE}
    tokens = conversation_tokens(TALK, base, RECORD, TOOLS)
    assert learnt(tokens, base) == learnt(conversation_tokens(TALK, base, RECORD), base)
    assert base.tokenizer.decode(tokens.input_ids).startswith('[{"type"')
