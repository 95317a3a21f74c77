"""From records to rows: what trains, what is held out, what is dropped, and what is refused with its place."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_training.data.examples import IGNORED, Example, Tokens
from core_training.data.records import Record, read_records
from core_training.data.rows import Collator
from core_training.engine.dataset import Dataset, load_dataset
from core_training.engine.engine import open_engine
from core_training.engine.tokenising import is_held_out
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.stages.base import load_stage
from core_training.stages.language import labelled_logits
from tests import tiny

MakeRecipe = Callable[..., Recipe]


@cache
def base_of(model: Path, mode: str = "lora") -> BaseModel:
    """One loaded model for all tests here."""
    text = f"model: {{name_or_path: '{model}'}}\nstage: sft\ntuning: {{mode: {mode}}}"
    from core_training.recipe.reading import parse_recipe

    return BaseModel(parse_recipe(text))


@pytest.fixture
def load(tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Dataset]:
    """Load a data set from lines (text, or objects) under a recipe with these sections."""

    def load(*lines: Any, **sections: Any) -> Dataset:
        path = tmp_path / "data.jsonl"
        text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
        data = {"train": str(path), "eval_fraction": 0.0, **sections.pop("data", {})}
        recipe = make_recipe(data=data, **sections)
        return load_dataset(recipe, load_stage(recipe, base_of(tiny_model)))

    return load


def message_of(load: Callable[..., Dataset], *lines: Any, **sections: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(*lines, **sections)
    assert caught.value.exit_code == 2
    return str(caught.value)


GOOD = {"question": "why?", "answer": "because"}
OTHER = {"question": "how?", "answer": "so"}
MARK = {"prompt": "why?", "completion": "because"}
PAIRS = [{"prompt": q["question"], "chosen": q["answer"], "rejected": "I do not know."} for q in tiny.questions(1, 20)]
MARKED = [
    {"prompt": q["question"], "completion": q["answer"], "label": i % 2 == 0}
    for i, q in enumerate(tiny.questions(1, 20))
]


def test_an_empty_data_set_is_named(load: Callable[..., Dataset]) -> None:
    for lines in ([], ["", "  "]):
        message = message_of(load, *lines)
        assert message.startswith("data.train: ")
        assert "data.jsonl holds no record" in message


def test_one_record_is_enough_to_train(load: Callable[..., Dataset]) -> None:
    dataset = load(GOOD)
    assert (dataset.report.train_examples, dataset.report.eval_examples) == (1, 0)


def test_one_record_that_is_held_out_is_explained(load: Callable[..., Dataset]) -> None:
    message = message_of(load, GOOD, data={"eval_fraction": 0.999999})
    assert message.startswith("data.train: all 1 usable examples of ")
    assert "data.jsonl are held out for evaluation" in message
    assert "data.eval_fraction: 0" in message


def test_a_record_without_the_column_is_named_with_those_it_has(load: Callable[..., Dataset]) -> None:
    message = message_of(load, GOOD, {"question": "why?", "reply": "because"})
    assert "data.jsonl, line 2: stage sft needs messages or question+answer or conversations or " in message
    assert "; the record has question, reply. " in message
    assert "data.columns" in message


def test_a_column_that_the_stage_does_not_have_is_named(load: Callable[..., Dataset]) -> None:
    message = message_of(load, GOOD, data={"columns": {"question": "prompt"}})
    assert message.startswith("data.columns.question: stage sft has no such column; write one of its own (messages, ")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "why?", "answer": ""}, "line 2: the completion is empty or not a string"),
        ({"question": None, "answer": "because"}, "line 2: the prompt is empty or not a string"),
        ({"messages": []}, "line 2: 'messages' must be a list of {role, content}"),
        ({"messages": [{"role": "user", "content": "why?"}]}, "line 2: 'messages' must be"),
        ({"messages": [{"role": "assistant"}]}, "line 2: 'messages' must be"),
        ('{"question": "\\ud800", "answer": "b"}', "line 2: not valid text"),
        ("question: why?", "line 2: not valid JSON"),
    ],
)
def test_a_record_with_nothing_in_it_is_named(load: Callable[..., Dataset], record: Any, expected: str) -> None:
    assert f"data.jsonl, {expected}" in message_of(load, GOOD, record)


def test_an_empty_text_is_named(load: Callable[..., Dataset]) -> None:
    message = message_of(load, {"text": "some"}, {"text": " "}, stage="pretrain", data={"columns": {}})
    assert "data.jsonl, line 2: the text is empty or not a string" in message


def test_records_with_nothing_to_learn_within_max_length_are_counted_and_left_out(load: Callable[..., Dataset]) -> None:
    long = {"question": "why? " * 100, "answer": "because"}
    dataset = load(GOOD, long)
    assert (dataset.report.train_examples, dataset.report.truncated, dataset.report.dropped) == (1, 1, 1)
    assert all(label != IGNORED for label in dataset.rows[0][0].sequences[0].labels[-2:])


def test_a_data_set_of_nothing_but_such_records_is_explained(load: Callable[..., Dataset]) -> None:
    long = {"question": "why? " * 100, "answer": "because"}
    message = message_of(load, long, long)
    assert "data.jsonl has a token to learn within training.max_length (64); raise it" in message


def test_an_all_padding_batch_has_a_loss_of_zero_and_moves_nothing(tiny_model: Path, make_recipe: MakeRecipe) -> None:
    base = base_of(tiny_model, "full")
    tokens = Tokens(np.full(5, base.tokenizer.pad_token_id), np.full(5, IGNORED))
    row = (Example((tokens,)),)
    batch = Collator(base.tokenizer.pad_token_id)([row, row])
    logits, counted = labelled_logits(base.model, batch)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), counted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    gradients = [parameter.grad for parameter in base.model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)
    recipe = make_recipe(tuning={"mode": "full"})
    judged = load_stage(recipe, base).loss(base.model.eval(), batch)
    assert (float(judged.total.detach()), int(judged.weight), int(judged.tokens)) == (0.0, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3), st.floats(0, 1))
def test_what_is_held_out_depends_on_the_content_alone(values: dict[str, Any], fraction: float) -> None:
    assert is_held_out(values, fraction) == is_held_out(dict(reversed(values.items())), fraction)
    assert not is_held_out(values, 0.0)
    if is_held_out(values, fraction):
        assert is_held_out(values, min(1.0, fraction * 1.1))


def test_about_the_wanted_share_is_held_out() -> None:
    held_out = sum(is_held_out({"prompt": str(i)}, 0.2) for i in range(5000))
    assert 850 < held_out < 1150  # 1000, give or take five standard deviations


@pytest.mark.parametrize("sites", [1, 2, 3, 7])
def test_the_evaluation_split_never_leaks_into_training(
    tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path, sites: int
) -> None:
    """Divided over any number of sites, with copies of the same record at several of them."""
    records = tiny.questions(0, 60)
    shares = [records[i::sites] + records[:5] for i in range(sites)]
    base = base_of(tiny_model)
    recipe = make_recipe()
    held_out = {
        json.dumps(r) for r in records if is_held_out({"prompt": r["question"], "completion": r["answer"]}, 0.2)
    }
    trained: set[str] = set()
    evaluated: set[str] = set()
    for number, share in enumerate(shares):
        path = tiny.write_jsonl(tmp_path / f"{sites}-{number}.jsonl", share)
        dataset = load_dataset(recipe, load_stage(recipe, base), list(read_records(path)))
        texts = {json.dumps(r): tuple(tokens_of(base, r)) for r in records}
        rows = {tiny.token_ids(row) for row in dataset.rows}
        kept = {tiny.token_ids(row) for rows in dataset.evaluation.values() for row in rows}
        trained |= {record for record, tokens in texts.items() if tokens in rows}
        evaluated |= {record for record, tokens in texts.items() if tokens in kept}
    assert trained.isdisjoint(evaluated)
    assert evaluated == held_out
    assert len(trained) == len(records) - len(held_out)


def tokens_of(base: BaseModel, record: dict[str, str]) -> list[int]:
    turns = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
    return list(base.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])


def test_with_files_for_evaluation_all_of_train_trains(load: Callable[..., Dataset], site_files: list[Path]) -> None:
    dataset = load(*tiny.questions(5, 20), data={"eval": str(site_files[0]), "eval_fraction": 0.5})
    assert dataset.report.train_examples == 20
    assert {source: len(examples) for source, examples in dataset.evaluation.items()} == {"site0": 12}


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("stage", "lines", "evaluation"),
    [
        ("sft", [GOOD], [GOOD]),
        ("sft", [{"instruction": "why?", "output": "because"}], [{"messages": [asked("why?"), said("because")]}]),
        ("pretrain", [{"text": "some", "id": 1}], [{"text": "some"}]),
        (
            "dpo",
            [{"prompt": "why?", "chosen": "because", "rejected": "no", "margin": 2}],
            [{"chosen": [asked("why?"), said("because")], "rejected": [asked("why?"), said("no")]}],
        ),
        ("kto", [{**MARK, "label": "true"}], [{"messages": [asked("why?"), said("because")], "kto_tag": True}]),
    ],
    ids=["the same line", "sft", "pretrain", "dpo", "kto"],
)
def test_a_record_of_the_evaluation_files_is_never_trained_in_whatever_layout(
    load: Callable[..., Dataset], tmp_path: Path, stage: str, lines: list[Any], evaluation: list[Any]
) -> None:
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in evaluation))
    others: list[Any] = {"sft": [OTHER], "pretrain": [{"text": "other"}], "dpo": PAIRS, "kto": MARKED}[stage]
    columns = {"prompt": "question", "completion": "answer"} if stage == "sft" else {}
    report = load(*lines, *others, stage=stage, data={"eval": str(path), "columns": columns}).report
    assert (report.train_examples, report.eval_examples, report.dropped) == (len(others), 1, 1)


def test_a_row_longer_than_the_models_context_is_refused(
    tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def examples(max_length: int, words: int) -> int:
        tiny.write_jsonl(tmp_path / "long.jsonl", [{"text": "fever " * words}])
        data = {"train": str(tmp_path / "long.jsonl"), "columns": {}, "eval_fraction": 0.0}
        recipe = make_recipe(stage="pretrain", data=data, training={"max_length": max_length})
        return load_dataset(recipe, load_stage(recipe, base_of(tiny_model))).report.train_examples

    assert examples(256, 300) > 1
    assert examples(1000, 100) == 1
    with pytest.raises(InputError, match=r"long\.jsonl, line 1: \d+ tokens.*max_length \(1000\).*_embeddings 256\)"):
        examples(1000, 300)


def changed_model(tiny_model: Path, folder: Path, change: Callable[[Path], Any]) -> Path:
    shutil.copytree(tiny_model, folder)
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda f: (f / "tokenizer.json").unlink(),
            ": it has no tokenizer (tokenizer.json); save one beside the weights",
        ),
        (lambda f: (f / "tokenizer.json").write_text("{"), ": its tokenizer cannot be loaded: "),
        (lambda f: (f / "config.json").unlink(), ": no config.json in it, so it is not a model folder"),
        (lambda f: (f / "model.safetensors").unlink(), ": it has no *.safetensors weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"{}" * 40), " cannot be loaded: "),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=3, layer_types=None),
            ": its weights lack 9 tensors, such as",
        ),
        (lambda f: edit(f / "tokenizer_config.json", eos_token=None), ": its tokenizer has no end-of-sequence token"),
        (shutil.rmtree, ": no such folder; name a model's, or its name on the hub"),
    ],
)
def test_a_model_folder_that_lacks_something_is_named(
    tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path, change: Callable[[Path], Any], expected: str
) -> None:
    folder = changed_model(tiny_model, tmp_path / "model", change)
    with pytest.raises(InputError) as caught:
        BaseModel(make_recipe(model={"name_or_path": str(folder)}))
    assert str(caught.value).startswith(f"model.name_or_path: {folder}{expected}")
    assert "\n" not in str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**document, **changes}.items() if v is not None}))


def test_a_model_without_a_chat_template_is_named_and_a_file_mends_it(
    tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = changed_model(tiny_model, tmp_path / "model", lambda f: (f / "chat_template.jinja").unlink())
    recipe = make_recipe(model={"name_or_path": str(folder)})
    with pytest.raises(InputError, match=r"has no chat template; give one with model\.chat_template"):
        load_dataset(recipe, tiny.stage_of(recipe))
    template = tmp_path / "chat.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)
    mended = make_recipe(model={"name_or_path": str(folder), "chat_template": str(template)})
    whole = make_recipe()
    rows = load_dataset(mended, tiny.stage_of(mended)).rows
    expected = load_dataset(whole, tiny.stage_of(whole)).rows
    assert [tiny.token_ids(row) for row in rows] == [tiny.token_ids(row) for row in expected]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}\n{% for %}", "chat.jinja, line 2: "),
        (None, "chat.jinja cannot be read: "),
    ],
)
def test_a_chat_template_that_is_none_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, template: str | None, expected: str
) -> None:
    path = tmp_path / "chat.jinja"
    if template is not None:
        path.write_text(template)
    with pytest.raises(InputError, match=r"model\.chat_template: ") as caught:
        BaseModel(make_recipe(model={"chat_template": str(path)}))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ 1 / loop.index0 }}{% endfor %}", "an expression in it raises ZeroDivisionError"),
        ("{{ messages[0]['content'] + 1 }}", "an expression in it raises TypeError"),
        ("{{ 1 / 0 }}", "an expression in it raises ZeroDivisionError"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, template: str, expected: str
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    recipe = make_recipe(model={"chat_template": str(path)})
    with pytest.raises(
        InputError, match=rf"site0\.jsonl, line 1: the chat template \(.*chat_template\).*: {expected}$"
    ):
        load_dataset(recipe, tiny.stage_of(recipe))


def plain(rows: Any) -> Any:
    """Rows as values that can be compared."""
    return [
        [([(t.input_ids.tolist(), t.labels.tolist()) for t in e.sequences], dict(e.numbers)) for e in row]
        for row in rows
    ]


@pytest.mark.parametrize(
    ("stage", "lines"),
    [
        ("sft", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, GOOD, GOOD]),
        ("pretrain", [*tiny.texts(1, 20), {"text": "long " * 300}]),
        ("dpo", [*PAIRS, {"prompt": "long " * 300, "chosen": "a", "rejected": "b"}]),
        ("kto", MARKED),
        ("reward", [PAIRS[0], {**PAIRS[1], "margin": 2}]),
    ],
)
def test_a_cache_changes_nothing(load: Callable[..., Dataset], tmp_path: Path, stage: str, lines: list[Any]) -> None:
    data = {"eval_fraction": 0.3, "columns": {"prompt": "question", "completion": "answer"} if stage == "sft" else {}}
    if stage == "reward":
        data["eval_fraction"] = 0.0
    usual = load(*lines, stage=stage, data=data)
    for _ in range(2):
        cached = load(*lines, stage=stage, data={**data, "cache": str(tmp_path / "cache")})
        assert plain(cached.rows) == plain(usual.rows)
        assert {k: plain(v) for k, v in cached.evaluation.items()} == {k: plain(v) for k, v in usual.evaluation.items()}
        assert (cached.report, cached.training_sources) == (usual.report, usual.training_sources)


def test_records_in_a_cache_are_tokenised_once(make_recipe: MakeRecipe, tmp_path: Path, site_files: list[Path]) -> None:
    """Until something changes that decides the tokens."""
    source = tmp_path / "data.jsonl"
    source.write_bytes(site_files[0].read_bytes())
    template = tmp_path / "chat.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)
    calls: list[int] = []

    def tokenised(records: list[Record] | None = None, **sections: Any) -> int:
        calls.clear()
        data = {"train": str(source), "cache": str(tmp_path / "cache"), **sections.pop("data", {})}
        stage = tiny.stage_of(make_recipe(data=data, **sections))
        whole = stage.tokenise

        def counted(*arguments: Any) -> Example:
            calls.append(1)
            return whole(*arguments)

        stage.tokenise = counted  # type: ignore[method-assign]
        load_dataset(stage.recipe, stage, records)
        return len(calls)

    changes: list[dict[str, Any]] = [
        {},
        {"training": {"max_length": 63}},
        {"data": {"eval_fraction": 0.3}},
        {"data": {"eval": str(site_files[1])}},
        {"data": {"columns": {"prompt": "answer", "completion": "question"}}},
        {"data": {"train": [str(source), str(site_files[1])]}},
        {"model": {"chat_template": str(template)}},
        {"records": list(read_records(site_files[2]))},
    ]
    template.write_text(tiny.CHAT_TEMPLATE + " ")
    for change in changes:
        assert tokenised(**change) > 0, change
    for change in changes:
        assert tokenised(**change) == 0, change
    assert tokenised(training={"learning_rate": 1.0, "seed": 7, "packing": True}) == 0
    source.write_text(source.read_text() + json.dumps(GOOD) + "\n")
    assert tokenised() > 0


def test_memory_does_not_grow_with_the_records_of_a_cache(
    tiny_model: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    def peak(name: str, count: int) -> int:
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{i} fever " * 60} for i in range(count)])
        data = {"train": str(path), "cache": str(tmp_path / "cache"), "columns": {}, "eval_fraction": 0.1}
        recipe = make_recipe(stage="pretrain", data=data, training={"packing": False})
        stage = load_stage(recipe, base_of(tiny_model))
        tracemalloc.start()
        dataset = load_dataset(recipe, stage)
        tokens = sum(len(example) for row in dataset.rows for example in row)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert tokens > 100 * count
        return most

    peak("first", 10)
    few, many = peak("few", 100), peak("many", 800)
    assert many - few < 0.05 * 16 * 700 * 180  # of the bytes that the further tokens and labels would take


def test_a_wrong_record_leaves_no_cache(load: Callable[..., Dataset], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    message = message_of(load, GOOD, {"question": "why?", "answer": ""}, data={"cache": str(cache)})
    assert "data.jsonl, line 2: the completion is empty" in message
    assert not [path for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_prompts_longer_than_max_length_are_counted(load: Callable[..., Dataset]) -> None:
    long = {"prompt": "why? " * 100, "chosen": "because", "rejected": "no"}
    report = load(*PAIRS, long, long, stage="dpo", data={"columns": {}}).report
    assert (report.train_examples, report.truncated, report.dropped) == (20, 2, 2)


@pytest.mark.parametrize("cache", [False, True])
def test_marks_of_one_kind_are_refused(load: Callable[..., Dataset], tmp_path: Path, cache: bool) -> None:
    data: dict[str, Any] = {"columns": {}, **({"cache": str(tmp_path / "cache")} if cache else {})}
    message = message_of(load, *MARKED[::2], stage="kto", data=data)
    assert message.startswith("data.train: every example is desirable (label true)")


def test_a_data_set_of_llama_factorys_is_read_by_its_name(load: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text(json.dumps([{"q": "why?", "a": "because"}, {"q": "how?", "a": "so"}]))
    entry = {"file_name": "qa.json", "columns": {"prompt": "q", "response": "a"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"qa": entry}))
    usual = load(
        {"prompt": "why?", "completion": "because"}, {"prompt": "how?", "completion": "so"}, data={"columns": {}}
    )
    for name, count in (("qa", 2), ("qa[:1]", 1)):
        named = load(data={"train": str(tmp_path / f"dataset_info.json:{name}"), "columns": {}})
        assert plain(named.rows) == plain(usual.rows)[:count]
        assert named.training_sources == {"qa": count}


@pytest.mark.parametrize("cache", [False, True])
def test_records_that_cannot_be_read_stop_the_run_or_are_skipped_and_counted(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: bool
) -> None:
    records = [*tiny.questions(0, 6), {"question": "", "answer": "none"}, {"ask": "?"}, *tiny.questions(1, 3)]
    data = {"train": str(tiny.write_jsonl(tmp_path / "d.jsonl", records)), "eval_fraction": 0.0}
    data |= {"cache": str(tmp_path / "cache")} if cache else {}
    with pytest.raises(InputError, match=r"d\.jsonl, line 7: "):
        open_engine(make_recipe(data=data))
    for _ in range(1 + cache):
        caplog.clear()
        engine = open_engine(make_recipe(data={**data, "on_error": "skip"}))
        assert (engine.data_report.train_examples, engine.data_report.dropped) == (9, 2)
        assert "2 of 11 records are skipped; the first: " in caplog.text
        engine.close()


TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]


def learnt_text(data: Dataset, base: BaseModel) -> str:
    (example,) = data.rows[0]
    tokens = example.sequences[0]
    return str(base.tokenizer.decode(tokens.input_ids[tokens.labels != IGNORED]))


@pytest.mark.parametrize(
    ("loss_on", "learnt"),
    [
        ("answers", "First.<|eos|>Second.<|eos|>"),
        ("last_answer", "Second.<|eos|>"),
        ("all", "<|bos|><|user|>One?<|assistant|>First.<|eos|><|user|>Two?<|assistant|>Second.<|eos|>"),
    ],
)
def test_loss_falls_on_what_the_recipe_says(
    load: Callable[..., Dataset], tiny_model: Path, loss_on: str, learnt: str
) -> None:
    data = load({"messages": TURNS}, data={"loss_on": loss_on, "columns": {}})
    assert learnt_text(data, base_of(tiny_model)) == learnt


def test_the_last_answer_is_not_learnt_where_the_record_says_so(load: Callable[..., Dataset]) -> None:
    turns = [*TURNS[:3], {**TURNS[3], "weight": 0}]
    assert "has a token to learn" in message_of(
        load, {"messages": turns}, data={"loss_on": "last_answer", "columns": {}}
    )
    said = message_of(load, {"messages": turns}, data={"loss_on": "all", "columns": {}})
    assert "line 1: a turn is not to be learnt" in said


def test_turns_that_the_template_does_not_take_are_folded_and_counted(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma's template takes no system text, and no two turns of one speaker in a row."""
    lines = [
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
        {"messages": [TURNS[0], TURNS[2], TURNS[1]]},
        {"messages": TURNS},
    ]
    path = tiny.write_jsonl(tmp_path / "talk.jsonl", lines)
    recipe = make_recipe(
        model={"name_or_path": str(tiny_model), "chat_template": "gemma"},
        data={"train": str(path), "eval_fraction": 0.0, "columns": {}},
        training={"packing": False},
    )
    stage = tiny.stage_of(recipe)
    data = load_dataset(recipe, stage)
    assert "data: in 2 of 3 records a system text stands at the beginning of the user's words" in caplog.text
    texts = [str(stage.base.tokenizer.decode(row[0].sequences[0].input_ids)) for row in data.rows]
    assert "user\nBe brief.\n\nOne?<end_of_turn>" in texts[0]
    assert "user\nOne?\n\nTwo?<end_of_turn>" in texts[1]


def test_a_template_has_a_name_and_an_unknown_one_is_told_those_there_are(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    folder = changed_model(tiny_model, tmp_path / "model", lambda f: (f / "chat_template.jinja").unlink())
    path = tiny.write_jsonl(tmp_path / "data.jsonl", [{"messages": TURNS}])  # type: ignore[list-item]
    data = {"train": str(path), "eval_fraction": 0.0, "columns": {}}
    recipe = make_recipe(
        model={"name_or_path": str(folder), "chat_template": "chatml"}, data=data, training={"max_length": 256}
    )
    stage = tiny.stage_of(recipe)
    assert learnt_text(load_dataset(recipe, stage), stage.base) == "First.<|im_end|>\nSecond.<|im_end|>\n"
    with pytest.raises(InputError, match=r"model\.chat_template: chatlm cannot be read.*published.*chatml, cohere"):
        tiny.stage_of(make_recipe(model={"name_or_path": str(folder), "chat_template": "chatlm"}, data=data))


def test_a_day_that_is_none_is_refused(make_recipe: MakeRecipe, tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"model\.chat_date: 'yesterday' is not a day"):
        make_recipe(model={"name_or_path": str(tiny_model), "chat_date": "yesterday"})


def test_so_many_records_of_each_file_are_read_and_so_mixed(
    make_recipe: MakeRecipe, tiny_model: Path, site_files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    names = [path.name.split(".")[0] for path in site_files[:2]]
    data = {"train": [str(path) for path in site_files[:2]], "eval_fraction": 0.0}
    recipe = make_recipe(data={**data, "max_samples": 12})
    stage = tiny.stage_of(recipe)
    assert load_dataset(recipe, stage).training_sources == dict.fromkeys(names, 12)
    recipe = make_recipe(data={**data, "max_samples": 12, "mix": {names[0]: 3, names[1]: 1}})
    mixed = load_dataset(recipe, stage)
    assert mixed.training_sources == {names[0]: 12, names[1]: 4}
    assert mixed.report.train_examples == len(mixed.rows) == 16
    assert "data.mix: 16 of 24 training examples are kept" in caplog.text
    with pytest.raises(InputError, match=r"data\.mix: it has shares for x"):
        load_dataset(make_recipe(data={**data, "mix": {"x": 1}}), stage)


@pytest.mark.parametrize(
    ("truncation", "learnt", "cut"),
    [(None, "a" * 6, 1), ("keep_start", "a" * 6, 1), ("keep_end", "a" * 9 + "<|eos|>", 1), ("leave_out", None, 0)],
)
def test_a_long_record_is_cut_where_the_recipe_says(
    load: Callable[..., Dataset], tiny_model: Path, truncation: str | None, learnt: str | None, cut: int
) -> None:
    long = {"question": "b" * 6, "answer": "a" * 9}
    training = {"max_length": 10, "truncation": truncation}
    data = load({"question": "b", "answer": "a"}, long, training=training, data={})
    assert (data.report.truncated, data.report.dropped) == (cut, 1 - cut)
    assert len(data.rows) == 1 + cut
    if learnt is not None:
        tokens = data.rows[1][0].sequences[0]
        said = base_of(tiny_model).tokenizer.decode(tokens.input_ids[tokens.labels != IGNORED])
        assert said == learnt[-len(said) :]
        assert said.endswith("<|eos|>") is (truncation == "keep_end")


def test_lines_that_are_no_records_are_skipped_and_counted_with_the_others(
    load: Callable[..., Dataset], caplog: pytest.LogCaptureFixture
) -> None:
    data = load(GOOD, "{broken", {"question": "why?"}, OTHER, data={"on_error": "skip"})
    assert (data.report.train_examples, data.report.dropped) == (2, 2)
    assert "2 of 4 records are skipped; the first: " in caplog.text
    assert "line 2: not valid JSON" in caplog.text


def test_a_tokenizer_that_closes_texts_itself_gives_one_end(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    recipe = make_recipe(
        stage="pretrain",
        data={
            "train": str(tiny.write_jsonl(tmp_path / "t.jsonl", [{"text": "one"}])),
            "columns": {},
            "eval_fraction": 0,
        },
    )
    stage = tiny.stage_of(recipe)
    tokenizer = stage.base.tokenizer
    usual = load_dataset(recipe, stage).rows[0][0].sequences[0].input_ids.tolist()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", tokenizer.eos_token_id)]
    )
    closed = load_dataset(recipe, stage).rows[0][0].sequences[0].input_ids.tolist()
    assert closed == usual
    assert closed.count(tokenizer.eos_token_id) == 1


def test_what_cannot_be_used_ends_the_run_or_is_left_out_and_counted(
    load: Callable[..., Dataset], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = {"type": "image", "image": "scan.png"}
    records = [
        {"messages": [{**TURNS[0], "content": [seen, {"type": "text", "text": "One?"}]}, TURNS[1]]},
        {"messages": [{**TURNS[0], "images": ["a.png"]}, TURNS[1]], "images": ["a.png"], "source": "x"},
        {"messages": TURNS[:2], "chat_template_kwargs": {"enable_thinking": False}, "images": []},
        {"messages": TURNS[:2]},
    ]
    for record in records[:3]:
        assert "data.unknown: warn" in message_of(load, record, data={"columns": {}})
    data = load(*records, data={"columns": {}, "unknown": "warn"})
    said = {base_of(tiny_model).tokenizer.decode(row[0].sequences[0].input_ids) for row in data.rows}
    assert said == {"<|bos|><|user|>One?<|assistant|>First.<|eos|>"}
    assert (
        "data.unknown: of 4 records these parts are left out: a content's part of type 'image' (in 1), "
        "a turn's 'images' (in 1), column 'images' (in 1), column 'chat_template_kwargs' (in 1)"
    ) in caplog.text


def test_a_column_that_is_null_decides_no_layout(load: Callable[..., Dataset]) -> None:
    """Tables have every column in every row."""
    empty = {"messages": None, "prompt": None, "completion": None}
    records = [{**empty, "messages": TURNS}, {**empty, "prompt": "One?", "completion": "First."}]
    assert load(*records, data={"columns": {}}).report.train_examples == 2
    assert "line 1: 'completion' must be " in message_of(load, {**empty, "prompt": "One?"}, data={"columns": {}})
