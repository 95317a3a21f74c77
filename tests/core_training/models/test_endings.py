"""Where an answer ends, and that all who ask are told the same."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from core_training.engine.engine import open_engine
from core_training.models.base_model import BaseModel
from core_training.models.chat_template import ChatTemplate
from core_training.models.conversation import Conversation, Sampling
from core_training.models.results import export_model, find_result
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.stages.rollout import Sampler

MakeRecipe = Callable[..., Recipe]

USER, ASSISTANT, EOS = 3, 4, 2
"""Tokens of the tiny model, of which the first two stand in for such as <|im_end|> and <|eot_id|>."""

TURNS = "{% for m in messages %}<|assistant|>{{ m['content'] }}CLOSING{% endfor %}"


def closing(text: str) -> str:
    """A template that writes this after each turn."""
    return TURNS.replace("CLOSING", text)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def generates(model: Path, **settings: Any) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("<|user|>", USER),
        ("<|user|>\n", USER),
        (" \n<|user|>\n", USER),
        ("{{ eos_token }}", EOS),
        ("<|user|>{{ eos_token }}", USER),  # generation stops at the first
        ("", None),
        ("\n", None),
        ("\nUser:", None),
        ("{{ 1 / 0 }}", None),
    ],
)
def test_a_template_closes_a_turn_with_a_token_of_its_own_or_with_none(
    tiny_model: Path, text: str, token: int | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = closing(text)
    assert ChatTemplate(tokenizer, date(2025, 1, 1)).turn_end == token


def test_all_who_ask_are_told_the_same(make_recipe: MakeRecipe, model: Path, tmp_path: Path) -> None:
    generates(model, eos_token_id=[EOS, ASSISTANT])
    (tmp_path / "closing.jinja").write_text(closing("<|user|>"))
    recipe = make_recipe(
        model={"name_or_path": str(model), "chat_template": str(tmp_path / "closing.jinja")},
        rollout={"stop": ["<|bos|>"]},
    )
    base = BaseModel(recipe)
    assert base.end_tokens == [EOS, ASSISTANT, USER]
    assert Sampler.of(recipe.rollout, base).stop_ids == [EOS, ASSISTANT, USER, 1]


@pytest.mark.parametrize("end", [EOS, USER, ASSISTANT])
def test_one_who_talks_stops_at_any_of_them_and_does_not_say_it(
    make_recipe: MakeRecipe, model: Path, end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generates(model, eos_token_id=[EOS, USER, ASSISTANT])
    base = BaseModel(make_recipe(model={"name_or_path": str(model)}))
    word = base.tokenizer.encode("ward", add_special_tokens=False)

    def spoken(input_ids: torch.Tensor, **_: Any) -> Any:
        """Say a word, then the end, then the word for ever."""
        said = [*word, end, *word * 100]
        logits = torch.zeros(*input_ids.shape, len(base.tokenizer))
        logits[:, -1, said[len(calls)]] = 1.0
        calls.append(None)
        return type("Output", (dict,), {"__getattr__": dict.__getitem__})(logits=logits)

    calls: list[None] = []
    conversation = Conversation(base, Sampling(max_tokens=60))
    monkeypatch.setattr(base.model, "forward", spoken)
    monkeypatch.setattr(type(base.model), "__call__", lambda self, **inputs: spoken(**inputs), raising=False)
    monkeypatch.setattr(base.model.get_base_model(), "forward", spoken)
    answer = conversation.reply("Which?")
    assert (answer.text, answer.tokens, answer.ended) == ("ward", len(word) + 1, True)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_they_are_written_beside_every_result(make_recipe: MakeRecipe, model: Path, tmp_path: Path, mode: str) -> None:
    """With the settings that the base's authors recommend, also where transformers calls these contradictory."""
    generates(model, eos_token_id=[EOS, ASSISTANT], do_sample=False, temperature=0.6)
    recipe = make_recipe(model={"name_or_path": str(model)}, tuning={"mode": mode}, output=str(tmp_path / "run"))
    engine = open_engine(recipe)
    engine.train(1)
    run = RunFolder(tmp_path / "run")
    run.prepare(recipe, resume=False)
    engine.save_model(run.path / ("adapter" if mode == "lora" else "model"))
    export_model(find_result(run.path), tmp_path / "exported")
    for folder in (*run.path.glob("adapter"), *run.path.glob("model"), tmp_path / "exported"):
        settings = GenerationConfig.from_pretrained(folder)
        assert settings.eos_token_id == [EOS, ASSISTANT]
        assert settings.temperature == 0.6
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").generation_config.eos_token_id == [
        EOS,
        ASSISTANT,
    ]


@pytest.mark.parametrize(
    ("text", "warns"), [("", True), ("\n", True), ("<|user|>\n", False), ("{{ eos_token }}", False)]
)
def test_records_that_teach_no_end_are_told_of(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, warns: bool
) -> None:
    (tmp_path / "closing.jinja").write_text(closing(text))
    with caplog.at_level(logging.WARNING):
        open_engine(make_recipe(model={"chat_template": str(tmp_path / "closing.jinja")}))
    assert ("are learnt without a token that ends an answer" in caplog.text) is warns
