"""What each stage's loss must be: closed forms written here, from whole logits of sequences without padding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from core_training.data.examples import Example, Tokens
from core_training.data.rows import Collator
from core_training.engine.engine import Engine, open_engine
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.schema import Recipe
from tests.core_training.preference_data import stage_recipe

MakeRecipe = Callable[..., Recipe]
STAGES = ["pretrain", "sft", "reward", "dpo", "kto", "orpo", "simpo"]
SETTINGS: dict[str, Any] = {
    "reward": {"center_rewards_coefficient": 0.3},
    "dpo": {"beta": 0.3},
    "kto": {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    "orpo": {"beta": 0.6},
    "simpo": {"beta": 2.5, "gamma": 1.2},
}


def logps(model: Any, tokens: Tokens) -> torch.Tensor:
    """The log-probability of each labelled token."""
    ids = torch.tensor(tokens.input_ids)
    table = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return torch.stack([table[i - 1, ids[i]] for i in range(1, len(ids)) if tokens.labels[i] != -100])


def ratio(model: Any, reference: Any, tokens: Tokens) -> torch.Tensor:
    with torch.no_grad():
        fixed = logps(reference, tokens).sum()
    return logps(model, tokens).sum() - fixed


def nll(model: Any, reference: Any, examples: Sequence[Example]) -> torch.Tensor:
    return -torch.cat([logps(model, tokens) for example in examples for tokens in example.sequences]).mean()


def reward(model: Any, reference: Any, examples: Sequence[Example]) -> torch.Tensor:
    losses = []
    for example in examples:
        good, bad = (model(input_ids=torch.tensor(t.input_ids)[None]).logits.squeeze() for t in example.sequences)
        losses.append(torch.log1p(torch.exp(bad - good + example.numbers["margin"])) + 0.3 * (good + bad) ** 2)
    return torch.stack(losses).mean()


def dpo(model: Any, reference: Any, examples: Sequence[Example]) -> torch.Tensor:
    losses = []
    for example in examples:
        good, bad = (ratio(model, reference, tokens) for tokens in example.sequences)
        losses.append(torch.log1p(torch.exp(-0.3 * (good - bad))))
    return torch.stack(losses).mean()


def kto(model: Any, reference: Any, examples: Sequence[Example]) -> torch.Tensor:
    mismatched = [ratio(model, reference, example.sequences[1]) for example in examples]
    kl = max(0.0, torch.stack(mismatched).mean().item())
    losses = []
    for example in examples:
        above = 0.4 * (ratio(model, reference, example.sequences[0]) - kl)
        good = example.numbers["desirable"] == 1
        losses.append(1.5 / (1 + torch.exp(above)) if good else 0.7 / (1 + torch.exp(-above)))
    return torch.stack(losses).mean()


def orpo(model: Any, reference: Any, examples: Sequence[Example]) -> torch.Tensor:
    losses = []
    for example in examples:
        good, bad = (logps(model, tokens).mean() for tokens in example.sequences)
        odds_ratio = (good.exp() / (1 - good.exp())) / (bad.exp() / (1 - bad.exp()))
        losses.append(-good + 0.6 * torch.log(1 + 1 / odds_ratio))
    return torch.stack(losses).mean()


def simpo(model: Any, reference: Any, examples: Sequence[Example]) -> torch.Tensor:
    losses = []
    for example in examples:
        good, bad = (logps(model, tokens).mean() for tokens in example.sequences)
        losses.append(torch.log(1 + torch.exp(1.2 - 2.5 * (good - bad))))
    return torch.stack(losses).mean()


CLOSED_FORMS = {"pretrain": nll, "sft": nll, **{f.__name__: f for f in (reward, dpo, kto, orpo, simpo)}}


def parts(engine: Engine) -> tuple[Any, list[torch.nn.Parameter], list[Example]]:
    """The engine's stage, its trainable parameters, and the training examples with all that the loss needs."""
    engine.launch()
    parameters = list(engine._base.trainable_parameters.values())
    return engine._stage, parameters, [row[0] for row in engine._rows]


def move(parameters: Sequence[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("stage", "mode", "seed"),
    [*((stage, "full", 0) for stage in STAGES), ("reward", "lora", 0), ("dpo", "lora", 0), ("kto", "full", 3)],
)
def test_loss_and_gradient_are_the_closed_form_when_the_policy_has_left_the_reference(
    make_recipe: MakeRecipe, tmp_path: Path, stage: str, mode: str, seed: int
) -> None:
    settings = {name: section for name, section in SETTINGS.items() if name == stage}
    recipe = stage_recipe(make_recipe, tmp_path, stage, mode, training={"packing": False}, **settings)
    the_stage, parameters, examples = parts(open_engine(recipe))
    examples = examples[:7]  # of both kinds, of unequal lengths
    if stage == "reward":
        examples = [Example(e.sequences, {"margin": 0.2 * i}) for i, e in enumerate(examples)]
    model = the_stage.base.model
    reference = copy.deepcopy(model)
    move(parameters, seed)

    expected = CLOSED_FORMS[stage](model, reference, examples)
    gradients = torch.autograd.grad(expected, parameters)
    loss = the_stage.loss(model, Collator(0)([(example,) for example in examples]))
    ours = torch.autograd.grad(loss.total / loss.weight, parameters)

    assert (loss.total / loss.weight).item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-4)
    assert all(bool(gradient.any()) for gradient in ours)
    if stage == "kto":  # an estimate below 0 counts as 0
        assert (float(loss.figures["kl"][0].detach()) > 0) == (seed == 0)


@pytest.mark.parametrize("mode", sorted(TUNING_MODES))
@pytest.mark.parametrize(("stage", "expected"), [("dpo", math.log(2)), ("kto", 0.5)])
def test_a_policy_that_is_its_reference_has_the_loss_of_not_knowing(
    make_recipe: MakeRecipe, tmp_path: Path, stage: str, expected: float, mode: str
) -> None:
    engine = open_engine(stage_recipe(make_recipe, tmp_path, stage, mode))
    (report,) = engine.evaluate().values()
    assert report.loss == pytest.approx(expected, abs=1e-6)
    assert all(value == pytest.approx(0, abs=1e-5) for value in report.metrics.values())  # margins, rewards, KL
    assert engine.train(1).loss_first == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", sorted(TUNING_MODES))
def test_a_reward_model_without_an_opinion_loses_ln_2_and_more_with_a_margin(
    make_recipe: MakeRecipe, tmp_path: Path, mode: str
) -> None:
    the_stage, _, examples = parts(open_engine(stage_recipe(make_recipe, tmp_path, "reward", mode)))
    model = the_stage.base.model
    with torch.no_grad():
        for name, parameter in the_stage.base.trainable_parameters.items():
            if "score" in name:
                parameter.zero_()
    for margin in (0.0, 0.7, 3.0):
        rows = [(Example(example.sequences, {"margin": margin}),) for example in examples[:4]]
        loss = the_stage.loss(model, Collator(0)(rows))
        assert (loss.total / loss.weight).item() == pytest.approx(math.log(1 + math.exp(margin)), abs=1e-6)


def test_losses_stay_finite_where_a_policy_is_certain() -> None:
    """ORPO's odds are infinite at probability 1, and a log-ratio may be far out."""
    from core_training.stages.kto import kto_losses
    from core_training.stages.orpo import orpo_losses
    from core_training.stages.simpo import simpo_losses

    good = torch.tensor([0.0, -50.0, -1e-9, -1e-3], requires_grad=True)
    bad = torch.tensor([-50.0, 0.0, -1e-9, -30.0], requires_grad=True)
    losses = [
        orpo_losses(good, bad, 0.1),
        simpo_losses(good, bad, 2.0, 1.0),
        kto_losses(100 * good, torch.tensor(0.0), bad < -1, 0.1),
    ]
    total = torch.stack(losses).sum()
    total.backward()
    assert total.isfinite()
    for answers in (good, bad):
        assert answers.grad is not None
        assert answers.grad.isfinite().all()
