"""The kinds of loss of stage `dpo`: each is TRL's, begins where its formula says, and adds up over sites."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from core_training.engine.engine import open_engine
from core_training.parts.stages.dpo import Dpo, LossType
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.stages.dpo_losses import DPO_LOSSES, LogRatios
from server.run_store import RunStore
from simulations import simulate
from tests import tiny
from tests.core_training.preference_data import pairs, stage_recipe
from tests.core_training.stages.test_trl_agreement import ARGUMENTS, Comparison, dataset, turns

MakeRecipe = Callable[..., Recipe]
LN_2 = math.log(2)
BETA = 0.25
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}
LOSSES_OF_NOT_KNOWING = {
    "sigmoid": LN_2,
    "sigmoid_norm": LN_2,
    "ipo": 1 / (4 * BETA**2),
    "hinge": 1.0,
    "robust": LN_2,
    "exo_pair": -LN_2 - math.log(0.999 * 0.001) / 2,
    "nca_pair": 2 * LN_2,
    "bco_pair": 2 * LN_2,
    "sppo_hard": 1 / (2 * BETA**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (LN_2 + 1) / 2,
}
KINDS = sorted(LOSSES_OF_NOT_KNOWING)


def section(kind: str, **further: Any) -> dict[str, Any]:
    return {"beta": BETA, "loss_type": kind, "label_smoothing": SMOOTHING.get(kind, 0.0), **further}


def test_the_table_has_every_kind_that_a_recipe_may_name() -> None:
    assert set(get_args(LossType)) == set(DPO_LOSSES) == set(KINDS)


def uneven_pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """Pairs whose chosen answers are of several lengths, as means over tokens are told from sums by them alone."""
    return [{**pair, "chosen": pair["chosen"] + " Now." * (i % 3)} for i, pair in enumerate(pairs(seed, count))]


def trl_trainer(both: Comparison, records: list[dict[str, Any]], kinds: list[str], **arguments: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        both.policy,
        both.reference,
        DPOConfig(both.folder, beta=BETA, max_length=None, loss_type=kinds, **arguments, **ARGUMENTS),
        train_dataset=dataset(records),
        processing_class=both.stage.base.tokenizer,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_trls_trainer(make_recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    both = Comparison(make_recipe, tmp_path, "dpo", dpo=section(kind))
    records = [turns(pair) for pair in uneven_pairs(0, 6)]
    trainer = trl_trainer(both, records, [kind], label_smoothing=SMOOTHING.get(kind, 0.0))
    both.check(both.examples(records), trainer, trainer.data_collator(list(trainer.train_dataset)))


def test_the_likelihood_term_is_trls_where_a_batch_is_one_pair(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """TRL's is a mean over the tokens of a batch, so it is another one for the same pairs in other batches."""
    both = Comparison(make_recipe, tmp_path, "dpo", dpo=section("sigmoid", sft_weight=0.7))
    records = [turns(pair) for pair in pairs(0, 1)]
    trainer = trl_trainer(both, records, ["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    both.check(both.examples(records), trainer, trainer.data_collator(list(trainer.train_dataset)))


def test_smoothing_weighs_the_loss_of_the_pairs_turned_round() -> None:
    """TRL has conservative DPO no more."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 50, generator=generator) * 20
    tokens = torch.ones(50)
    plain, smooth = Dpo(), Dpo(label_smoothing=0.2)
    there = LogRatios(chosen, rejected, tokens, tokens)
    back = LogRatios(rejected, chosen, tokens, tokens)
    loss = DPO_LOSSES["sigmoid"]
    torch.testing.assert_close(loss(there, smooth), 0.8 * loss(there, plain) + 0.2 * loss(back, plain))


def test_robust_dpo_on_pairs_partly_turned_round_is_dpo_on_the_right_ones() -> None:
    """The paper's claim: of the share ε of wrong labels nothing is left in the mean."""
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) * 20
    tokens = torch.ones(50)
    settings = Dpo(loss_type="robust", label_smoothing=0.2)
    right = DPO_LOSSES["robust"](LogRatios(chosen, rejected, tokens, tokens), settings)
    wrong = DPO_LOSSES["robust"](LogRatios(rejected, chosen, tokens, tokens), settings)
    plain = DPO_LOSSES["sigmoid"](LogRatios(chosen, rejected, tokens, tokens), Dpo())
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_its_reference_has_the_formulas_value_at_zero(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str
) -> None:
    engine = open_engine(stage_recipe(make_recipe, tmp_path, "dpo", dpo=section(kind)))
    (report,) = engine.evaluate().values()
    assert report.loss == pytest.approx(LOSSES_OF_NOT_KNOWING[kind], abs=1e-5)
    assert engine.train(1).loss_first == pytest.approx(LOSSES_OF_NOT_KNOWING[kind], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_stay_finite_far_from_the_reference(kind: str) -> None:
    far = torch.tensor([0.0, 3000.0, -3000.0, 3000.0, -3000.0], requires_grad=True)
    further = torch.tensor([0.0, -3000.0, 3000.0, 3000.0, -3000.0], requires_grad=True)
    tokens = torch.ones(5)
    losses = DPO_LOSSES[kind](LogRatios(far, further, tokens, tokens), Dpo.model_validate(section(kind)))  # type: ignore[index]
    losses.sum().backward()
    assert losses.isfinite().all()
    for ratios in (far, further):
        assert ratios.grad is not None
        assert ratios.grad.isfinite().all()


ONE_STEP: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 64,
    "max_steps": 1,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_of_two_sites_is_one_central_step(make_recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    """Sites of unequal size, each with all its pairs in one batch; central in four batches."""
    files = [
        str(tiny.write_jsonl(tmp_path / f"site{site}.jsonl", uneven_pairs(site, count)))
        for site, count in enumerate((10, 14))
    ]
    settings: dict[str, Any] = {
        "dpo": section(kind, sft_weight=0.3),
        "data": {"train": files, "eval_fraction": 0.0},
        "simulation": {"sites": files},
    }
    parts = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}
    engine = open_engine(stage_recipe(make_recipe, tmp_path, "dpo", **settings, training={**ONE_STEP, **parts}))
    start = engine.read_state()
    assert engine.train(1).weight == 24
    shared = stage_recipe(
        make_recipe,
        tmp_path,
        "dpo",
        **settings,
        training=ONE_STEP,
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
    )
    simulate(shared, RunFolder(tmp_path / "run"), lambda *_: None, resume=False)
    committed = RunStore(RunFolder(tmp_path / "run")).latest()
    assert committed is not None
    assert np.abs(engine.read_state().buffer - start.buffer).max() > 1e-3
    np.testing.assert_allclose(committed[1].buffer, engine.read_state().buffer, atol=1e-5)
