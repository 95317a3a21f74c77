"""Training on preferences: what it learns, what its reference is, and which records it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.stages.base import load_stage
from tests import tiny
from tests.core_training.preference_data import feedback, pairs, records, stage_recipe
from tests.test_laws import central_digest

MakeRecipe = Callable[..., Recipe]
PREFERENCES = ["dpo", "kto", "orpo", "simpo"]


def loss(engine: Engine) -> float:
    (report,) = engine.evaluate().values()
    assert report.loss is not None
    return report.loss


def margin(engine: Engine, stage: str) -> float:
    """By how much more the held-out better answers are rewarded than the worse ones."""
    (report,) = engine.evaluate().values()
    if stage == "kto":
        return report.metrics["desirable_reward"] - report.metrics["undesirable_reward"]
    return report.metrics["margin"]


def moved(state: TrainableState, seed: int = 0) -> TrainableState:
    noise = np.random.default_rng(seed).normal(0, 0.1, state.buffer.shape)
    return TrainableState(state.manifest, state.buffer + noise.astype(np.float32))


# What it learns


@pytest.mark.parametrize("stage", ["reward", *PREFERENCES])
def test_gradient_accumulation_equals_one_large_batch(make_recipe: MakeRecipe, tmp_path: Path, stage: str) -> None:
    """KTO's too: at the first step its estimate of the KL is 0 in every batch."""
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "max_steps": 1}
    states, reports = [], []
    for size, accumulated in ((8, 1), (2, 4)):
        training = {
            **settings,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
        }
        engine = open_engine(stage_recipe(make_recipe, tmp_path, stage, training=training))
        reports.append(engine.train(1))
        states.append(engine.read_state())
    assert reports[0].weight == reports[1].weight == 8
    assert reports[0].loss_mean == pytest.approx(reports[1].loss_mean, abs=1e-6)
    assert np.abs(states[0].buffer - engine.initial_state.buffer).max() > 1e-3
    np.testing.assert_allclose(states[0].buffer, states[1].buffer, atol=2e-6)


@pytest.mark.parametrize("stage", ["reward", *PREFERENCES])
def test_loss_falls_on_memorised_data_and_the_better_answers_win(
    make_recipe: MakeRecipe, tmp_path: Path, stage: str
) -> None:
    """Held-out answers differ as those learnt do, so the held-out margin rises with it."""
    training = {"max_steps": 30, "learning_rate": 3e-3}
    engine = open_engine(stage_recipe(make_recipe, tmp_path, stage, training=training))
    before = margin(engine, stage)
    report = engine.train(30)
    assert report.loss_last < 0.8 * report.loss_first
    assert margin(engine, stage) > before + 0.1


@pytest.mark.parametrize("stage", PREFERENCES)
def test_a_chain_from_sft_raises_the_held_out_preference_margin(
    make_recipe: MakeRecipe, tmp_path: Path, sft_run: Path, stage: str
) -> None:
    """Two run folders: the second starts from what the first learnt, and that is its reference."""
    recipe = stage_recipe(
        make_recipe,
        tmp_path,
        stage,
        "lora",
        model={"adapters": [str(sft_run)]},
        training={"max_steps": 20, "learning_rate": 1e-2},
    )
    engine = open_engine(recipe)
    before = margin(engine, stage)
    if stage in ("dpo", "kto"):
        assert before == pytest.approx(0, abs=1e-5)
    engine.train(20)
    # ORPO's reward is β (0.1) times the mean log-probability of a token.
    assert margin(engine, stage) > before + (0.02 if stage == "orpo" else 0.1)


@pytest.fixture(scope="module")
def sft_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a model that gives better and worse answers alike."""
    folder = tmp_path_factory.mktemp("sft")
    train = tiny.write_jsonl(folder / "answers.jsonl", records("sft", 0, 40))
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_model)},
            "stage": "sft",
            "tuning": {"mode": "full"},
            "data": {"train": str(train)},
            "training": {"learning_rate": 1e-2, "max_steps": 30, "max_length": 64},
        }
    )
    central_digest(recipe, folder / "run")
    return folder / "run"


# Its reference


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_reference_stays_the_start_of_the_run(make_recipe: MakeRecipe, tmp_path: Path, mode: str) -> None:
    """Also where the parameters hold another state when it is asked, as where several sites share a base."""
    recipe = stage_recipe(make_recipe, tmp_path, "dpo", mode)
    base = BaseModel(recipe)
    stages = [load_stage(recipe, base) for _ in range(2)]
    first, second = (Engine(stage, load_dataset(recipe, stage)) for stage in stages)
    other = moved(base.initial_state)
    first.begin_round(other)
    second.begin_round(other)
    assert loss(first) == loss(second) != pytest.approx(math.log(2), abs=1e-3)
    assert second.read_state().digest == other.digest  # asking the reference changed nothing
    second.begin_round(second.initial_state)
    assert loss(second) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_restored_run_equals_the_one_that_was_never_stopped(
    make_recipe: MakeRecipe, tmp_path: Path, stage: str
) -> None:
    tuning = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
    recipe = stage_recipe(make_recipe, tmp_path, stage, tuning=tuning)
    engine = open_engine(recipe)
    engine.train(3)
    engine.checkpoint(tmp_path / "kept")
    engine.train(3)
    again = open_engine(recipe)
    again.restore(tmp_path / "kept")
    assert again._rows.numbers == engine._rows.numbers  # by the reference, not by the state restored
    assert bool(engine._rows.numbers) == (stage in ("dpo", "kto"))
    again.train(3)
    assert again.read_state().digest == engine.read_state().digest
    assert loss(again) == loss(engine)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_engines_that_share_a_base_train_as_if_alone(make_recipe: MakeRecipe, tmp_path: Path, stage: str) -> None:
    recipes = []
    for seed in range(2):
        data = tiny.write_jsonl(tmp_path / f"site{seed}.jsonl", records(stage, seed, 10 + 3 * seed))
        recipes.append(stage_recipe(make_recipe, tmp_path, stage, "lora", data={"train": str(data)}))
    alone = []
    for recipe in recipes:
        engine = open_engine(recipe)
        engine.train(4)
        alone.append((engine.read_state().digest, loss(engine)))
    base = BaseModel(recipes[0])
    stages = [load_stage(recipe, base) for recipe in recipes]
    together = [Engine(one, load_dataset(one.recipe, one)) for one in stages]
    for _ in range(2):
        for engine in together:
            engine.train(2)
    assert [(engine.read_state().digest, loss(engine)) for engine in together] == alone


# Its records


def data_of(make_recipe: MakeRecipe, folder: Path, stage: str, lines: list[dict[str, Any]], limit: int = 64) -> Engine:
    train = tiny.write_jsonl(folder / "records.jsonl", lines)
    data = {"train": str(train), "eval_fraction": 0.0}
    return open_engine(stage_recipe(make_recipe, folder, stage, data=data, training={"max_length": limit}))


@pytest.mark.parametrize(("label", "kind"), [(True, "desirable"), (False, "undesirable")])
def test_labels_all_of_one_kind_are_refused(make_recipe: MakeRecipe, tmp_path: Path, label: bool, kind: str) -> None:
    lines = [{**line, "label": label} for line in feedback(0, 4)]
    with pytest.raises(InputError, match=f"every example is {kind} .*both kinds"):
        data_of(make_recipe, tmp_path, "kto", lines)


@pytest.mark.parametrize("stage", ["reward", "dpo", "orpo", "simpo"])
def test_pairs_that_are_the_same_after_the_cut_are_dropped_and_counted(
    make_recipe: MakeRecipe, tmp_path: Path, stage: str
) -> None:
    alike = {"prompt": "Fever?", "chosen": "pain " * 40 + "rash", "rejected": "pain " * 40 + "cough"}
    cut = {"prompt": "Fever?", "chosen": "rash " * 40, "rejected": "cough"}
    no_room = {"prompt": "pain " * 40, "chosen": "rash", "rejected": "cough"}
    engine = data_of(make_recipe, tmp_path, stage, [*pairs(0, 5), alike, cut, no_room], limit=32)
    report = engine.data_report
    assert (report.train_examples, report.truncated, report.dropped) == (6, 3, 2)
    engine.train(1)


def test_pairs_with_and_without_a_margin_train_together(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    lines = [{**pair, **({"margin": 2.0} if i % 2 else {})} for i, pair in enumerate(pairs(0, 8))]
    engine = data_of(make_recipe, tmp_path, "reward", lines)
    assert sorted({row[0].numbers["margin"] for row in engine._rows}) == [0.0, 2.0]
    assert engine.train(1).weight == 4


@pytest.mark.parametrize("order", ["side by side", "one kind after the other"])
def test_kto_estimates_the_kl_on_answers_to_other_prompts(make_recipe: MakeRecipe, tmp_path: Path, order: str) -> None:
    lines = feedback(0, 12)
    if order != "side by side":
        lines.sort(key=lambda line: line["label"])
    engine = data_of(make_recipe, tmp_path, "kto", lines)
    tokenizer = engine._base.tokenizer
    answers = {line["prompt"]: {a["completion"] for a in lines if a["prompt"] == line["prompt"]} for line in lines}
    for row, line in zip(engine._rows, lines, strict=True):
        text = tokenizer.decode(row[0].sequences[1].input_ids)
        prompt, answer = text.removeprefix("<|bos|><|user|>").removesuffix("<|eos|>").split("<|assistant|>")
        assert prompt == line["prompt"]
        assert answer not in answers[prompt]
        assert any(answer in others for others in answers.values())


def test_kto_pairs_no_row_with_itself_where_all_share_a_prompt(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    lines = [{"prompt": "Fever?", "completion": sign, "label": i % 2 == 0} for i, sign in enumerate(tiny.SIGNS)]
    engine = data_of(make_recipe, tmp_path, "kto", lines)
    own = [row[0].sequences[0].input_ids.tolist() for row in engine._rows]
    others = [row[0].sequences[1].input_ids.tolist() for row in engine._rows]
    assert others == [own[-1], *own[:-1]]


def test_mismatched_answers_keep_within_the_length_limit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A long prompt loses its beginning, so that the other answer is there to be judged."""
    lines = [
        {"prompt": "Fever?", "completion": "cough " * 20, "label": False},
        {"prompt": "pain " * 20, "completion": "rash", "label": True},
        {"prompt": "Pain?", "completion": "itching", "label": True},
    ]
    engine = data_of(make_recipe, tmp_path, "kto", lines, limit=32)
    own = [row[0].sequences[0] for row in engine._rows]
    for index, row in enumerate(engine._rows):
        joined = row[0].sequences[1]
        answer = [label for label in own[index - 1].labels.tolist() if label != -100]
        assert len(joined) <= 32
        assert joined.input_ids[-len(answer) :].tolist() == answer
        assert joined.labels.tolist() == [-100] * (len(joined) - len(answer)) + answer
