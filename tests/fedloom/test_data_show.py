"""`fedloom data show`: what the model reads, and what it learns of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.core_training import preference_data
from tests.fedloom.conftest import Command

RecipeFile = Callable[..., Path]


@pytest.fixture
def shown(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The records of a stage, as JSON."""

    def show(stage: str, records: list[dict[str, Any]], *arguments: str, **sections: Any) -> list[dict[str, Any]]:
        data = tiny.write_jsonl(tmp_path / "d.jsonl", records)
        path = recipe_file(stage=stage, data={"train": str(data), "columns": {}, "eval_fraction": 0.0}, **sections)
        outcome = fedloom("data", "show", path, "--json", *arguments)
        assert outcome.code == 0, outcome.err
        return [json.loads(line) for line in outcome.out.splitlines()]

    return show


def test_a_record_is_shown_as_the_model_reads_it(shown: Callable[..., Any]) -> None:
    first, second = shown(
        "sft", [{"prompt": "Why?", "completion": "Fever."}, {"prompt": "And?", "completion": "Pain."}]
    )
    assert first["place"].endswith("d.jsonl, line 1")
    assert (first["part"], first["dropped"]) == ("train", False)
    (sequence,) = first["sequences"]
    assert sequence["text"] == "<|bos|><|user|>Why?<|assistant|>Fever.<|eos|>"
    assert sequence["learnt"] == "Fever.<|eos|>"
    assert 0 < sequence["learnt_tokens"] < sequence["tokens"]
    assert sequence["cut"] is False
    assert second["sequences"][0]["learnt"] == "Pain.<|eos|>"


def test_a_pair_has_two_sequences_and_a_prompt_nothing_to_learn(shown: Callable[..., Any], tmp_path: Path) -> None:
    pair = {"prompt": "Why?", "chosen": "Fever.", "rejected": "Pain."}
    (record,) = shown("dpo", [pair])
    assert [one["learnt"] for one in record["sequences"]] == ["Fever.<|eos|>", "Pain.<|eos|>"]
    (tmp_path / "judge.py").write_text("def score(prompts, completions):\n    return [0.0 for _ in completions]\n")
    judge = {"reward_function": f"{tmp_path / 'judge.py'}:score", "max_new_tokens": 4}
    (record,) = shown("grpo", [{"prompt": "Why?"}], rollout=judge)
    (sequence,) = record["sequences"]
    assert sequence["text"].endswith("Why?<|assistant|>")
    assert (sequence["learnt"], sequence["learnt_tokens"]) == ("", 0)


def test_a_cut_and_a_record_without_anything_left_are_said(shown: Callable[..., Any]) -> None:
    records = [{"prompt": "Why?", "completion": "Fever. " * 40}, {"prompt": "Why " * 60, "completion": "Pain."}]
    cut, dropped = shown("sft", records, training={"max_length": 32})
    assert cut["sequences"][0]["cut"] is True
    assert cut["sequences"][0]["tokens"] == 32
    assert dropped["dropped"] is True


def test_a_limit_ends_it(shown: Callable[..., Any]) -> None:
    assert len(shown("reward", preference_data.records("reward", 0, 9), "--limit", "2")) == 2


def test_a_person_sees_some_records_and_all_lengths(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    records = [*tiny.questions(0, 30), {"question": "Why?", "answer": "Fever. " * 200}]
    data = tiny.write_jsonl(tmp_path / "d.jsonl", records)
    outcome = fedloom(
        "data", "show", recipe_file(data={"train": str(data), "eval_fraction": 0.5}, training={"max_length": 48})
    )
    assert outcome.code == 0, outcome.err
    assert "d.jsonl, line 1 (" in outcome.out
    assert "d.jsonl, line 4 (" not in outcome.out
    assert "31 records: " in outcome.out
    assert "1 records (3%) cut at 48 tokens" in outcome.out
    assert "up to 64 " in outcome.out
    assert "← cut here" in outcome.out
    assert "█" in outcome.out
    assert "warning: training.max_length 48 cuts" in outcome.err


def test_a_record_cannot_write_to_the_terminal(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"question": "\x1b[2JWhy?", "answer": "[bold]Fever."}])
    outcome = fedloom("data", "show", recipe_file(data={"train": str(data), "eval_fraction": 0.0}))
    assert "\x1b[2J" not in outcome.out
    assert "[bold]Fever." in outcome.out


def test_the_weights_are_not_read(fedloom: Command, recipe_file: RecipeFile, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert fedloom("data", "show", recipe_file(model={"name_or_path": str(model)}), "--json").code == 0


def test_rows_that_share_are_counted_and_leaks_said(fedloom: Command, recipe_file: RecipeFile, tmp_path: Path) -> None:
    """The same long answer to other questions is learnt and held out at once."""
    answer = "Rest, plenty of water, and a visit to the heart ward if the fever of the lung does not go down in a week."
    records = [{"question": f"What helps in case {i}?", "answer": answer} for i in range(40)]
    data = tiny.write_jsonl(tmp_path / "d.jsonl", records)
    sections = {"data": {"train": str(data), "eval_fraction": 0.3}, "training": {"max_length": 256, "packing": None}}
    outcome = fedloom("data", "show", recipe_file(**sections), "--limit", "0")
    held_out = int(outcome.out.split(" held out")[0].rpartition(" ")[2])
    assert f"warning: {held_out} held-out answers (100%) stand word for word in training" in outcome.err
    assert "packed, where the model can: " in outcome.out
    assert "rows of 256 tokens" in outcome.out


def test_many_records_are_read_in_several_processes_in_their_order(
    fedloom: Command, recipe_file: RecipeFile, tmp_path: Path
) -> None:
    records = [{"question": f"Why {i}?", "answer": "Fever."} for i in range(1500)]
    records[1400] = {"question": "Why?", "answer": ""}
    data = tiny.write_jsonl(tmp_path / "d.jsonl", records)
    sections = {"data": {"train": str(data), "eval_fraction": 0.0, "on_error": "skip"}}
    outcome = fedloom("data", "show", recipe_file(**sections), "--json")
    places = [int(json.loads(line)["place"].rpartition(" ")[2]) for line in outcome.out.splitlines()]
    assert places == [i for i in range(1, 1501) if i != 1401]
    assert "1 of 1500 records are skipped; the first: " in outcome.err
    sections["data"]["on_error"] = "stop"
    outcome = fedloom("data", "show", recipe_file(**sections), "--json")
    assert outcome.code == 2
    assert "d.jsonl, line 1401: the completion is empty" in outcome.err
