"""Chat templates that loop and tokenizers that go back and forth are refused, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.limits import TooMuchError, within
from core_training.models.base_model import BaseModel
from core_training.models.chat_template import ChatTemplate, named_template, template_names
from core_training.recipe.schema import Recipe
from tests import tiny
from tests.hostile.test_text import refused

MakeRecipe = Callable[..., Recipe]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = tiny.CHAT_TEMPLATE
TEMPLATES: dict[str, str] = {
    "loops in loops": LOOP,
    "loops after what it says": PLAIN + LOOP,
    "a text of gigabytes": "{{ 'x' * 99999999999 }}",
    "a text that doubles": "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "padding without an end": "{{ 'x' | center(99999999999) }}",
    "a power of powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a macro of itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}" + LOOP,
    "a list of lists": "{{ [[0] * 99999] * 99999 }}",
    "a mebibyte": "{# " + "x" * 2**20 + " #}",
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for as long as a slow machine is given."""
    monkeypatch.setattr("core_training.models.tokenizer_trial._SECONDS", 3)
    monkeypatch.setattr("core_training.models.tokenizer_trial._MEMORY", 2**30)
    monkeypatch.setattr("core_training.models.chat_template.RENDERED_WITHIN", 1.0)
    monkeypatch.setattr("core_training.models.chat_template.RENDERED_IN", 2**27)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def trained(recipe: Recipe) -> object:
    return open_engine(recipe).train(1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_of_a_model_goes_on_without_an_end(make_recipe: MakeRecipe, folder: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    refused(lambda: trained(make_recipe(model={"name_or_path": str(folder)})), InputError)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_of_a_recipe_goes_on_without_an_end(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.jinja").write_text(TEMPLATES[name])
    refused(lambda: trained(make_recipe(model={"chat_template": str(tmp_path / "x.jinja")})), InputError)


@pytest.mark.parametrize("harm", [LOOP, "{{ 'x' * 99999999999 }}"])
def test_a_template_that_waits_for_a_word_does_not_go_on_either(
    make_recipe: MakeRecipe, folder: Path, harm: str
) -> None:
    """It tells every conversation that is tried, and then the record in which the word stands."""
    template = PLAIN + "{% if 'Case 0-3' in messages[0]['content'] %}" + harm + "{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    said = refused(lambda: trained(make_recipe(model={"name_or_path": str(folder)})), InputError)
    assert "line 4: the chat template" in said
    assert "Case 0-3" not in said


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` gives or raises in another thread than the main one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(timeout=60)


@pytest.fixture(scope="module")
def templates(tiny_model: Path) -> Callable[[str], ChatTemplate]:
    """The tiny model's tokenizer with another chat template."""
    from transformers import AutoTokenizer

    def make(template: str) -> ChatTemplate:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        return ChatTemplate(tokenizer, date(2026, 11, 30))

    return make


QUESTION = [{"role": "user", "content": "What?"}]
IN_ONE_OPERATION = {
    "squares of squares": "{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "lists that are alike": "{{ [[[0] * 9999] * 9999] * 9999 == [[[0.0] * 9999] * 9999] * 9999 }}",
}


@pytest.mark.parametrize("name", ["a text of gigabytes", *IN_ONE_OPERATION])
def test_no_template_goes_on_without_an_end_in_another_thread_either(
    templates: Callable[[str], ChatTemplate], name: str
) -> None:
    """Nothing can interrupt that thread, nor, while it computes in one operation, any other."""
    template = templates((TEMPLATES | IN_ONE_OPERATION)[name])
    began = time.monotonic()
    with pytest.raises((TooMuchError, MemoryError)):
        in_a_thread(lambda: template.text(QUESTION))
    assert time.monotonic() - began < 30  # the start of a process included


def test_a_model_whose_template_loops_is_refused_in_another_thread(make_recipe: MakeRecipe, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(LOOP)
    recipe = make_recipe(model={"name_or_path": str(folder)})
    assert "more than 1 s" in refused(lambda: in_a_thread(lambda: BaseModel(recipe)), InputError)


def test_a_run_in_another_thread_is_the_run_in_the_main_one(make_recipe: MakeRecipe) -> None:
    def digest() -> str:
        engine = open_engine(make_recipe())
        engine.train(2)
        return engine.read_state().digest

    assert in_a_thread(digest) == digest()


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be 😀 brief."},
    {"role": "user", "content": "What is 2 + 2? <é>"},
    {"role": "assistant", "content": "4"},
]


@pytest.mark.parametrize("name", template_names())
def test_a_published_template_tells_the_same_in_another_thread(
    templates: Callable[[str], ChatTemplate], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("core_training.models.chat_template.RENDERED_WITHIN", 10.0)
    template = templates(named_template(name) or "")

    def told() -> list[Any]:
        said = []
        for look in (
            lambda: template.text(CONVERSATION[1:2], to_answer=True),
            lambda: template.text_and_marks(CONVERSATION),
            lambda: template.with_tools(({"type": "function", "function": {"name": "f"}},)).text(CONVERSATION),  # type: ignore[arg-type]
        ):
            try:
                said.append(look())
            except Exception as error:
                said.append((type(error), str(error)))
        return said

    here = told()
    template.found_out.clear()
    assert in_a_thread(told) == here


def split(pattern: str) -> dict[str, Any]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [rule, byte_level]}}


def replace(*pairs: tuple[str, str]) -> dict[str, Any]:
    rules = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    return {"normalizer": {"type": "Sequence", "normalizers": rules}}


def decode(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Rules for putting a text together again."""
    rules = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"decoder": {"type": "Sequence", "decoders": [byte_level, *rules]}}


TOKENIZERS: dict[str, dict[str, Any]] = {
    "one in another": split(r"(a+)+$"),
    "one or the other": split(r"(e|ee)+$"),
    "words in words": split(r"(\w+\s?)*$"),
    "three in a row": split(r".*.*.*="),
    "a rule that is none": split(r"(((("),
    "a text that unfolds": replace(*[("q", "q" * 1000)] * 4),
    "a text that doubles": replace(*[("x", "xx")] * 40),
    "an answer that unfolds": decode(*[("q", "q" * 1000)] * 4),
    "a token that unfolds": decode(*[("<|user|>", "<|user|>" * 1000)] * 4),
    "an answer that doubles": decode(*[("x", "xx")] * 40),
    "a kind that is none": {"normalizer": {"type": "Pickle"}},
    "no model": {"model": {"type": "Exec"}},
    "a vocabulary of negative numbers": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_tokenizer_goes_on_without_an_end(make_recipe: MakeRecipe, folder: Path, name: str) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | TOKENIZERS[name]))
    refused(lambda: BaseModel(make_recipe(model={"name_or_path": str(folder)})), InputError)


@pytest.mark.parametrize("name", ["a text that doubles", "one in another"])
def test_no_rule_is_passed_over_for_how_it_is_written(make_recipe: MakeRecipe, folder: Path, name: str) -> None:
    document = json.loads((folder / "tokenizer.json").read_text()) | TOKENIZERS[name]
    text = json.dumps(document).replace('"Replace"', r'"\u0052eplace"').replace('"Regex"', r'"\u0052egex"')
    (folder / "tokenizer.json").write_text(text)
    refused(lambda: BaseModel(make_recipe(model={"name_or_path": str(folder)})), InputError)


def test_a_tokenizer_of_other_files_is_tried_out_too(
    make_recipe: MakeRecipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(document["vocab"]))
    merges = (" ".join(pair) if isinstance(pair, list) else pair for pair in document["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = make_recipe(model={"name_or_path": str(folder)})
    assert BaseModel(recipe).tokenizer("a text")["input_ids"]
    monkeypatch.setattr("core_training.models.tokenizer_trial._MEMORY", 2**20)
    monkeypatch.setattr("core_training.models.tokenizer_trial._passed", set())
    assert "tokenizer" in refused(lambda: BaseModel(recipe), InputError)


def test_published_rules_are_no_reason_to_refuse(make_recipe: MakeRecipe, folder: Path) -> None:
    """Those of GPT-4, Llama 3 and Qwen, which look ahead."""
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | split(rule)))
    assert trained(make_recipe(model={"name_or_path": str(folder)}))


def test_a_rule_that_waits_for_a_word_is_told_with_its_record(
    make_recipe: MakeRecipe, folder: Path, tmp_path: Path
) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | split(r"QZ(a+)+$")))
    records = [*tiny.questions(0, 8), {"question": "QZ" + "a" * 60 + "!", "answer": "x"}]
    data = {"train": str(tiny.write_jsonl(tmp_path / "x.jsonl", records))}
    said = refused(lambda: trained(make_recipe(model={"name_or_path": str(folder)}, data=data)), InputError)
    assert "x.jsonl, line 9" in said


def test_limits_hold_and_leave_nothing_behind() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(TooMuchError, match=r"0\.2 s"), within(0.2, 2**30):
        time.sleep(60)
    with pytest.raises(TooMuchError, match="64 MiB"), within(5, 64 * 2**20):
        bytearray(2**30)
    with within(0.3, 2**30):
        pass
    time.sleep(0.4)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert len(bytearray(2**28)) == 2**28


def test_an_alarm_that_was_set_before_goes_off_all_the_same() -> None:
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    before = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with within(5, 2**30):
            pass
        time.sleep(0.5)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)
