"""The loop of steps: what `transformers.Trainer` does, bit for bit; many paused at once; a failed step never was."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_training.data.rows import Collator, padded_size
from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import DivergedError, RunError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.stages.base import Stage
from core_training.stages.language import LanguageStage
from tests import tiny

MakeRecipe = Callable[..., Recipe]
DROPOUT = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}
# 45 examples or so, 2 x 3 to a step: an epoch ends within what would be a step, and the steps go on after it.
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 10,
    "warmup_steps": 3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 0.05,
}


def trained_by_transformers(recipe: Recipe) -> torch.Tensor:
    """What `transformers.Trainer` makes of the same rows with the same loss; the trained values, one after another."""
    from transformers import Trainer, TrainingArguments

    stage = tiny.stage_of(recipe)
    rows = load_dataset(recipe, stage).rows
    training = recipe.training

    class Theirs(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
            return stage.loss(model, inputs).total / num_items_in_batch

    arguments = TrainingArguments(
        output_dir="unused",
        learning_rate=recipe.training.learning_rate,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps or -1,
        warmup_steps=training.warmup_steps,
        lr_scheduler_type=training.lr_scheduler_type,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        seed=training.seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def collate(batch: list[Any]) -> Any:  # the rows of a part stand in the order of their lengths
        return Collator(stage.base.tokenizer.pad_token_id)(sorted(batch, key=padded_size))

    trainer = Theirs(model=stage.base.model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    return torch.from_numpy(Engine(stage, load_dataset(recipe, stage)).read_state().buffer.copy())


@pytest.mark.parametrize("more", [{}, {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}])
def test_the_loop_is_transformers_trainer_bit_for_bit(make_recipe: MakeRecipe, more: dict[str, Any]) -> None:
    recipe = make_recipe(tuning=DROPOUT, training={**TRAINING, **more})
    engine = open_engine(recipe)
    for _ in range(recipe.training.max_steps or 0):
        engine.train(1)
    ours = torch.from_numpy(engine.read_state().buffer)
    assert torch.equal(ours, trained_by_transformers(recipe))


def test_loops_that_accumulate_differently_interleave_as_if_alone(make_recipe: MakeRecipe) -> None:
    recipes = [
        make_recipe(tuning=DROPOUT, training={**TRAINING, "gradient_accumulation_steps": number}) for number in (2, 3)
    ]
    alone = []
    for recipe in recipes:
        engine = open_engine(recipe)
        engine.train(10)
        alone.append(engine.read_state().digest)
    engines = [open_engine(recipe) for recipe in recipes]
    for _ in range(10):
        for engine in engines:
            engine.train(1)
    assert [engine.read_state().digest for engine in engines] == alone


def test_the_process_keeps_its_random_numbers(make_recipe: MakeRecipe) -> None:
    """Opening, training, evaluating and restoring draw from the run's own."""
    recipe = make_recipe(tuning=DROPOUT)

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    expected = drawn()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(7)
    engine = open_engine(recipe)
    for generator in (random.seed, np.random.seed, torch.manual_seed):  # a model's head and adapters are drawn
        generator(7)
    engine.launch()
    engine.train(2)
    engine.evaluate()
    assert drawn() == expected


@pytest.mark.slow
def test_no_greenlet_is_needed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Where none can be imported, a run trains in slices all the same."""
    (tmp_path / "recipe.yaml").write_text(make_recipe(tuning=DROPOUT).to_yaml())
    program = (
        "import sys; sys.modules['greenlet'] = None\n"
        "from core_training.recipe.reading import load_recipe\n"
        "from core_training.engine.engine import open_engine\n"
        "from pathlib import Path\n"
        f"engine = open_engine(load_recipe(Path({str(tmp_path / 'recipe.yaml')!r})))\n"
        "engine.train(1), engine.evaluate(), engine.train(1)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3], timeout=120)
    sources = [path for path in Path(__file__).parents[3].glob("*/**/*.py") if ".venv" not in path.parts]
    assert not [path for path in sources if path != Path(__file__) and "import greenlet" in path.read_text()]


# A step that fails


def wrong_shape(_: Any) -> torch.Tensor:
    return torch.ones(3, 4) @ torch.ones(5, 6)


def too_large(_: Any) -> torch.Tensor:
    return torch.empty(1 << 60)


def wrong_index(_: Any) -> torch.Tensor:
    return torch.nn.functional.embedding(torch.tensor([9]), torch.zeros(3, 2))


def no_graph(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().sum()


class FailsBackward(torch.autograd.Function):
    """Fails in C++, on the thread that goes back through the graph."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return wrong_shape(gradient)


FORWARD = {
    wrong_shape: r"the forward pass of step 3 failed: RuntimeError: mat1 and mat2 shapes cannot be multiplied .3x4 and",
    too_large: r"out of memory in the forward pass of step 3.*; lower training\.per_device_train_batch_size \(4\) or "
    r"training\.max_length \(64\), or set training\.gradient_checkpointing",
    wrong_index: r"the forward pass of step 3 failed: IndexError: index out of range in self",
}


def failing_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, what: Callable[[Any], Any], step: int = 3) -> None:
    """Have the loss of this engine's step fail."""
    inner = LanguageStage.loss

    def loss(self: LanguageStage, model: Any, batch: Any) -> Any:
        result = inner(self, model, batch)
        if model.training and engine.step == step - 1:
            what(result.total)
        return result

    monkeypatch.setattr(LanguageStage, "loss", loss)


@pytest.mark.parametrize("what", FORWARD, ids=lambda what: what.__name__)
def test_a_failed_step_is_one_line_and_never_was(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, what: Callable[[Any], Any]
) -> None:
    """The engine lives on: tried again, the step comes to what it would have come to."""
    recipe = make_recipe(tuning=DROPOUT, training={**TRAINING, "per_device_train_batch_size": 4})
    whole = open_engine(recipe)
    whole.train(10)
    engine = open_engine(recipe)
    failing_at(engine, monkeypatch, what)
    with pytest.raises(RunError, match=FORWARD[what]) as caught:
        engine.train(10)
    assert "\n" not in str(caught.value)
    assert engine.step == 2
    assert [report.steps for report in engine.salvage() or []] == [2]
    monkeypatch.undo()
    engine.train(8)
    assert engine.read_state().digest == whole.read_state().digest


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_failure_in_the_backward_pass_leaves_no_gradient_behind(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, accumulated: int
) -> None:
    recipe = make_recipe(
        tuning=DROPOUT,
        training={**TRAINING, "per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated},
    )
    whole = open_engine(recipe)
    whole.train(10)
    engine = open_engine(recipe)
    inner, calls = LanguageStage.loss, iter(range(1000))

    def loss(self: LanguageStage, model: Any, batch: Any) -> Any:
        result = inner(self, model, batch)
        last = model.training and next(calls) == 2 * accumulated + (accumulated > 1)
        return replace(result, total=FailsBackward.apply(result.total)) if last else result

    monkeypatch.setattr(LanguageStage, "loss", loss)
    with pytest.raises(RunError, match=r"the backward pass of step 3 failed: RuntimeError: mat1 and mat2"):
        engine.train(10)
    monkeypatch.undo()
    assert all(parameter.grad is None for parameter in engine._base.trainable_parameters.values())
    engine.train(8)
    assert engine.read_state().digest == whole.read_state().digest


def test_a_failure_in_the_optimizer_needs_a_checkpoint(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """It may have changed some of the parameters, and nobody knows which."""
    recipe = make_recipe(tuning=DROPOUT)
    whole, engine = open_engine(recipe), open_engine(recipe)
    whole.train(6)
    engine.train(2)
    engine.checkpoint(tmp_path / "kept")

    hook = engine._current.optimizer.register_step_post_hook(lambda *_: too_large(None))
    with pytest.raises(RunError, match=r"out of memory in the optimizer of step 3"):
        engine.train(1)
    hook.remove()
    assert engine.salvage() is None
    with pytest.raises(RunError, match="step 3 failed half-way; go back to a checkpoint"):
        engine.train(1)
    engine.restore(tmp_path / "kept")
    engine.train(4)
    assert engine.read_state().digest == whole.read_state().digest


def test_a_loss_that_no_trained_parameter_enters_is_found_before_the_first_step(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = LanguageStage.loss
    monkeypatch.setattr(LanguageStage, "loss", lambda *a: replace(result := inner(*a), total=no_graph(result.total)))
    engine = open_engine(make_recipe())
    before = engine.read_state().digest
    with pytest.raises(RunError, match=r"nothing that is trained enters the loss of stage 'sft'; let tuning\.lora"):
        engine.train(1)
    assert (engine.step, engine.read_state().digest) == (0, before)


def test_trained_tensors_that_the_loss_does_not_reach_are_named_once(
    make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter on the output layer of a reward model, which has another one."""
    recipe = make_recipe(tuning={"mode": "full"})
    stage = tiny.stage_of(recipe)
    unused = torch.nn.Linear(2, 3)
    stage.base.model.unused = unused
    engine = Engine(stage, load_dataset(recipe, stage))
    engine.train(2)
    (record,) = caplog.records
    assert "2 of " in record.message
    assert "such as unused.bias" in record.message


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_what_is_no_number_never_reaches_the_optimizer(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    inner = LanguageStage.loss
    engine = open_engine(make_recipe(tuning=DROPOUT))

    def loss(self: Stage[Any], model: Any, batch: Any) -> Any:
        result = inner(self, model, batch)  # type: ignore[arg-type]
        if not model.training or engine.step < 2:
            return result
        # The square root of nothing is finite, its slope is not.
        broken = result.total * float("nan") if of == "loss" else result.total + (result.total * 0).sqrt()
        return replace(result, total=broken)

    monkeypatch.setattr(LanguageStage, "loss", loss)
    engine.train(2)
    before = engine.read_state().digest
    what = "training loss" if of == "loss" else "gradient"
    with pytest.raises(DivergedError, match=f"the {what} is no longer finite at step 3; lower training.learning_rate"):
        engine.train(1)
    assert (engine.step, engine.read_state().digest) == (2, before)
    assert engine.salvage() == []


@pytest.mark.parametrize("damage", ["missing", "torn", "pickle", "empty", "garbage"])
def test_a_damaged_checkpoint_is_named(make_recipe: MakeRecipe, tmp_path: Path, damage: str) -> None:
    engine = open_engine(make_recipe())
    engine.train(1)
    engine.checkpoint(tmp_path / "kept")
    file = tmp_path / "kept" / "loop" / "progress.pt"
    if damage == "missing":
        file.unlink()
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "garbage":
        file.write_bytes(b"(" * 8)
    else:
        file.write_bytes(pickle.dumps({"step": print}))
    with pytest.raises(RunError, match="not a checkpoint of this version and recipe"):
        open_engine(make_recipe()).restore(tmp_path / "kept")


def test_an_evaluation_that_is_no_number_is_said(make_recipe: MakeRecipe) -> None:
    engine = open_engine(make_recipe())
    state = engine.read_state()
    engine.begin_round(TrainableState(state.manifest, np.full_like(state.buffer, np.nan)))
    with pytest.raises(DivergedError, match="the evaluation's loss is no longer finite after step 0"):
        engine.evaluate()


def test_a_loss_whose_graph_reaches_nothing_that_is_trained_is_no_warning(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under gradient checkpointing a loss has a graph in any case."""
    inner = LanguageStage.loss

    def loss(self: LanguageStage, model: Any, batch: Any) -> Any:
        result = inner(self, model, batch)
        return replace(result, total=result.total.detach() * torch.ones((), requires_grad=True))

    monkeypatch.setattr(LanguageStage, "loss", loss)
    engine = open_engine(make_recipe())
    for _ in range(2):  # and whoever asks again is told again
        with pytest.raises(RunError, match="nothing that is trained enters the loss"):
            engine.train(1)


def test_a_process_of_a_group_stays_one_when_it_loads_another_model(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model's own recipe knows nothing of the group."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    tiny.stage_of(make_recipe())
    assert os.environ["LOCAL_RANK"] == "1"
