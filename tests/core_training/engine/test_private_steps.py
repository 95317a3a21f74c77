"""The gradients of DP-SGD's steps: against a loop over the units in plain PyTorch, and against what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from core_training.data.rows import Collator
from core_training.engine import private_steps
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError
from core_training.privacy.noise import SecretRandom
from core_training.recipe.schema import Recipe
from tests import tiny

MakeRecipe = Callable[..., Recipe]
NO_NOISE = 1e-12
ALL = 1000
"""Units drawn on average, more than there are: each step takes all."""


def records_of(stage: str) -> list[dict[str, Any]]:
    asked = tiny.questions(3, 9)
    if stage == "pretrain":
        return [{"text": f"{one['question']} {one['answer']}"} for one in asked]
    if stage == "sft":
        return [{"prompt": one["question"], "completion": one["answer"]} for one in asked]
    return [{"prompt": one["question"], "chosen": one["answer"], "rejected": "No."} for one in asked]


def private(make_recipe: MakeRecipe, tmp_path: Any, stage: str = "sft", **sections: Any) -> Recipe:
    file = tiny.write_jsonl(tmp_path / f"{stage}.jsonl", sections.pop("records", records_of(stage)))
    terms = {"clip": 0.5, "noise_multiplier": NO_NOISE, **sections.pop("terms", {})}
    training = {"per_device_train_batch_size": ALL, **sections.pop("training", {})}
    return make_recipe(
        stage=stage,
        data={"train": str(file), "columns": {}, "eval_fraction": 0.0},
        privacy={"differential_privacy": terms},
        training=training,
        **sections,
    )


def left_gradient(engine: Engine) -> tuple[dict[str, torch.Tensor], Any]:
    """The gradient that a step leaves, by parameter; and the loop's private steps."""
    engine.launch()
    steps = engine._current._private
    assert steps is not None
    steps.leave_gradient()
    trained = engine._base.trainable_parameters
    found = {name: p.grad.clone() for name, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    return found, steps


def clipped_by_hand(engine: Engine, clip: float, owners: list[int]) -> dict[str, torch.Tensor]:
    """Σ over the units of their clipped gradients, each of the mean over its own loss units, one after the other."""
    stage, rows = engine._stage, engine._rows
    collate = Collator(engine._base.tokenizer.pad_token_id)
    trained = engine._base.trainable_parameters
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    model = engine._current.prepared.model
    for unit in sorted(set(owners)):
        losses = [stage.loss(model, collate([rows[i]])) for i, owner in enumerate(owners) if owner == unit]
        mean = sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)
        gradients = torch.autograd.grad(mean, list(trained.values()), allow_unused=True)
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients if g is not None))
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient * min(1.0, clip / float(norm))
    return sums


def moved(engine: Engine) -> None:
    """Random values in what is trained: at the start LoRA's B is 0, and A has no gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in engine._base.trainable_parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], units: int) -> None:
    largest = max(float(one.abs().max()) for one in expected.values()) / units
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one / units, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "orpo", "simpo"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_units_are_clipped_as_by_a_loop(make_recipe: MakeRecipe, tmp_path: Any, stage: str, mode: str) -> None:
    engine = open_engine(private(make_recipe, tmp_path, stage, tuning={"mode": mode}))
    engine.launch()
    moved(engine)
    found, steps = left_gradient(engine)
    rows = len(engine._rows)
    expected = clipped_by_hand(engine, 0.5, list(range(rows)))
    assert_alike(found, expected, rows)
    assert (steps._together is not None) == (mode == "lora" and stage != "reward") or stage == "reward"


@pytest.mark.parametrize(("mode", "dtype"), [("freeze", "float32"), ("qlora", "float32"), ("lora", "bfloat16")])
def test_so_they_are_in_the_other_modes(make_recipe: MakeRecipe, tmp_path: Any, mode: str, dtype: str) -> None:
    recipe = private(make_recipe, tmp_path, tuning={"mode": mode}, model={"dtype": dtype})
    engine = open_engine(recipe)
    engine.launch()
    moved(engine)
    found, _ = left_gradient(engine)
    expected = clipped_by_hand(engine, 0.5, list(range(len(engine._rows))))
    if dtype == "float32":
        assert_alike(found, expected, len(engine._rows))
    else:  # sums of other lengths are rounded elsewhere
        flat, meant = (torch.cat([one.flatten() for one in of.values()]) for of in (found, expected))
        assert torch.nn.functional.cosine_similarity(flat, meant, dim=0) > 0.999


def test_gradient_checkpointing_and_accumulation_change_nothing(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    plain, other = (
        open_engine(private(make_recipe, tmp_path, training=training))
        for training in ({}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2})
    )
    for engine in (plain, other):
        engine.launch()
        moved(engine)
    assert_alike(left_gradient(other)[0], {n: g * 9 for n, g in left_gradient(plain)[0].items()}, 9)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_all_records_of_a_patient_are_one_unit(make_recipe: MakeRecipe, tmp_path: Any, mode: str) -> None:
    patients = ["a", "b", "a", "c", "c", "a", "d", "b", "e"]
    records = [{**one, "patient": who} for one, who in zip(records_of("sft"), patients, strict=True)]
    recipe = private(make_recipe, tmp_path, records=records, terms={"unit": "patient"}, tuning={"mode": mode})
    engine = open_engine(recipe)
    assert engine.data_report.units == 5
    engine.launch()
    moved(engine)
    found, _ = left_gradient(engine)
    assert_alike(found, clipped_by_hand(engine, 0.5, ["abcde".index(who) for who in patients]), 5)


def test_a_long_text_in_several_rows_is_one_unit(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    long = " ".join(one["answer"] for one in tiny.questions(1, 12))
    records = [{"text": long}, {"text": "See the ward."}]
    recipe = private(make_recipe, tmp_path, "pretrain", records=records, training={"max_length": 32})
    engine = open_engine(recipe)
    assert (engine.data_report.units, len(engine._rows) > 3) == (2, True)


def test_a_record_that_does_not_say_whose_it_is_is_refused(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    records = [{**one, "patient": who} for one, who in zip(records_of("sft")[:3], ["a", "", "b"], strict=True)]
    recipe = private(make_recipe, tmp_path, records=records, terms={"unit": "patient"})
    with pytest.raises(InputError, match=r"line 2: column 'patient' does not say whose"):
        open_engine(recipe)


def test_layers_that_are_not_given_the_rows_one_by_one_are_found_out(
    make_recipe: MakeRecipe, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A layer whose input has something else in front has the right shape and the wrong gradients."""
    engine = open_engine(private(make_recipe, tmp_path))
    engine.launch()
    moved(engine)
    steps = engine._current._private
    assert steps is not None
    assert steps._together is not None

    @contextmanager
    def turned_around(rows: int, sequences: int) -> Iterator[Any]:
        with type(steps._together).recorded(together, rows, sequences) as record:
            note = record.note
            record.note = lambda parameter, gradients: note(parameter, gradients.roll(1, 0) * (1 + gradients.sum()))
            yield record

    together = steps._together
    together.recorded = turned_around  # type: ignore[method-assign]
    found, _ = left_gradient(engine)
    assert "does not keep the rows of a batch apart" in caplog.text
    assert_alike(found, clipped_by_hand(engine, 0.5, list(range(9))), 9)


@pytest.mark.parametrize("zeros", [False, True], ids=["one row", "no gradient"])
def test_what_cannot_tell_whether_rows_are_apart_is_no_check(
    make_recipe: MakeRecipe, tmp_path: Any, *, zeros: bool
) -> None:
    records = records_of("sft")[: 9 if zeros else 1]
    engine = open_engine(private(make_recipe, tmp_path, records=records))
    engine.launch()
    if zeros:
        with torch.no_grad():
            for parameter in engine._base.trainable_parameters.values():
                parameter.zero_()
    _, steps = left_gradient(engine)
    assert not steps._is_checked
    assert steps._together is not None


def test_rows_in_one_with_their_tokens_are_not_apart(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    """Some models give their layers (rows × tokens, width): each token would be clipped as a row."""
    engine = open_engine(private(make_recipe, tmp_path))
    engine.launch()
    moved(engine)
    steps = engine._current._private
    assert steps is not None
    for module in engine._base.model.modules():
        if type(module).__name__ == "LlamaMLP":
            inner = module.forward
            module.forward = lambda x, inner=inner: inner(x.flatten(0, 1)).view_as(x)
    found, _ = left_gradient(engine)
    assert steps._together is None
    assert_alike(found, clipped_by_hand(engine, 0.5, list(range(9))), 9)


def test_a_unit_whose_gradient_is_no_number_adds_nothing(
    make_recipe: MakeRecipe, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Not an error: it would tell that the unit is there."""
    engine = open_engine(private(make_recipe, tmp_path))
    engine.launch()
    with torch.no_grad():
        for parameter in engine._base.trainable_parameters.values():
            parameter.fill_(1e30)
    found, _ = left_gradient(engine)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    report = engine.train(1)
    assert (report.weight, report.loss_last) == (0, 0.0)
    assert caplog.text.count("add nothing") == 1


def test_no_unit_adds_more_than_the_clip(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    records = records_of("sft")[:1]
    engine = open_engine(private(make_recipe, tmp_path, records=records, terms={"clip": 1e-3}))
    engine.launch()
    moved(engine)
    found, _ = left_gradient(engine)
    norm = float(torch.sqrt(sum((one.double() ** 2).sum() for one in found.values())))
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_noise_is_as_large_as_was_asked_for_and_another_each_time(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    recipe = private(make_recipe, tmp_path, terms={"noise_multiplier": 3.0, "clip": 0.25}, tuning={"mode": "full"})
    engine = open_engine(recipe)
    drawn = [torch.cat([one.flatten() for one in left_gradient(engine)[0].values()]) for _ in range(2)]
    # The clipped sum is the same in both, so their difference is noise alone: √2 of it.
    noise = ((drawn[0] - drawn[1]) * len(engine._rows) / np.sqrt(2)).double().numpy()
    assert noise.std() == pytest.approx(0.75, rel=0.01)
    assert scipy_stats.kstest(noise / 0.75, "norm").pvalue > 1e-3


def test_an_empty_batch_is_noise_alone(make_recipe: MakeRecipe, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nobody(SecretRandom):
        def drawn(self, count: int, rate: float) -> Any:
            return np.empty(0, dtype=np.int64)

    monkeypatch.setattr(private_steps, "SecretRandom", Nobody)
    engine = open_engine(private(make_recipe, tmp_path, terms={"noise_multiplier": 1.0}))
    report = engine.train(2)
    assert (report.weight, report.tokens, report.loss_last) == (0, 0, 0.0)
    assert engine.read_state().digest != engine.initial_state.digest


def test_without_noise_and_clipping_a_run_is_a_plain_one(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    """Where all units are drawn, and each weighs the same in a plain batch, too, as pairs do."""
    training = {"max_steps": 5, "max_grad_norm": 0.0}
    terms = {"clip": 1e6, "noise_multiplier": 1e-18}
    hidden = private(make_recipe, tmp_path, "dpo", training=training, terms=terms)
    plain = hidden.model_copy(update={"privacy": make_recipe().privacy})
    states = []
    for recipe in (hidden, plain):
        engine = open_engine(recipe)
        engine.train(5)
        states.append(engine.read_state().buffer - engine.initial_state.buffer)
    np.testing.assert_allclose(states[0], states[1], atol=2e-3 * np.abs(states[1]).max())


def test_units_are_drawn_by_chance_as_often_as_was_said() -> None:
    counts = [len(SecretRandom().drawn(500, 0.1)) for _ in range(400)]
    assert np.mean(counts) == pytest.approx(50, abs=1.5)
    assert np.var(counts) == pytest.approx(45, rel=0.35)
