"""Optimizers and schedules by their usual names: each is the library's own, at a site as at one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames, SchedulerType

from core_training.engine.engine import open_engine
from core_training.engine.optimizers import build_optimizer, build_schedule
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.recipe.learning_rate import most_learning_rate
from core_training.recipe.optimisation import (
    OPTIMIZERS,
    OWN_SCHEDULES,
    SCHEDULES,
    UNUSABLE_OPTIMIZERS,
    UNUSABLE_SCHEDULES,
)
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from fedloom.recipe_account import warnings_of
from simulations import simulate
from strategies.fedavg import FedAvg

MakeRecipe = Callable[..., Recipe]

PACKAGED = {
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "stable_adamw": "torch-optimi",
    "grokadamw": "grok",
}
"""Those whose package is no part of the environment of the tests."""
HERE = [name for name in OPTIMIZERS if name not in PACKAGED]
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5},
    "polynomial": {"power": 2.0},
}


def stepped(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The trained parameters after two steps along gradients from a seed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in trained]


def test_every_name_of_transformers_is_known_or_refused() -> None:
    assert {*OPTIMIZERS, *UNUSABLE_OPTIMIZERS} == {name.value for name in OptimizerNames}
    assert {*SCHEDULES, *UNUSABLE_SCHEDULES} - {*OWN_SCHEDULES} == {name.value for name in SchedulerType}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, None) for name in HERE),
        ("ademamix", "beta1=0.5,beta3=0.99, alpha=8,t_alpha=4,t_beta3=4"),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("adagrad", "lr_decay=0.5"),
        ("rmsprop", "alpha=0.5,momentum=0.9,centered=true"),
    ],
)
def test_a_step_is_the_librarys_own(make_recipe: MakeRecipe, tmp_path: Path, name: str, arguments: str | None) -> None:
    training = {"optim": name, "optim_args": arguments, "weight_decay": 0.1, "adam_beta2": 0.95}
    recipe = make_recipe(tuning={"mode": "full"}, training=training)
    ours = BaseModel(recipe).model
    theirs = BaseModel(recipe).model
    trainer = Trainer(
        theirs,
        TrainingArguments(
            str(tmp_path),
            optim=name,
            optim_args=arguments,
            learning_rate=1e-2,
            weight_decay=0.1,
            adam_beta2=0.95,
            use_cpu=True,
            report_to="none",
        ),
    )
    expected = stepped(theirs, trainer.create_optimizer())
    assert all(map(torch.equal, stepped(ours, build_optimizer(ours, recipe, 1e-2)), expected))
    if arguments is not None:
        plain, silent = BaseModel(recipe).model, make_recipe(training={**training, "optim_args": None})
        assert not all(map(torch.equal, stepped(plain, build_optimizer(plain, silent, 1e-2)), expected))


def test_an_argument_that_is_no_number_is_named(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"optim": "ademamix", "optim_args": "alpha=much"})
    with pytest.raises(InputError, match=r"training\.optim: ademamix: could not convert string to float: 'much'"):
        build_optimizer(BaseModel(recipe).model, recipe, 1e-3)


AVERAGED: dict[str, dict[str, Any]] = {
    **{name: {"training": {"optim": name}} for name in HERE if name not in ("adamw_torch", "sgd")},
    **{
        name: {
            "training": {"lr_scheduler_type": name, "lr_scheduler_kwargs": SETTINGS.get(name, {}), "warmup_steps": 1}
        }
        for name in SCHEDULES
    },
    "dora": {"tuning": {"lora": {"r": 4, "use_dora": True}}},
    "rslora": {"tuning": {"lora": {"r": 4, "use_rslora": True}}},
    "pissa": {"tuning": {"lora": {"r": 4, "init_lora_weights": "pissa"}}},
    "olora": {"tuning": {"lora": {"r": 4, "init_lora_weights": "olora"}}},
}
"""Optimizers, schedules and kinds of LoRA, by the sections of a recipe that has one."""


@pytest.mark.slow
@pytest.mark.parametrize("name", AVERAGED)
def test_two_sites_average_what_it_makes(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path, name: str
) -> None:
    sections: dict[str, Any] = {
        **AVERAGED[name],
        "training": {"learning_rate": 1e-3, **AVERAGED[name].get("training", {})},
        "topology": {"kind": "federated", "rounds": 2, "local_steps": 2},
    }
    sites = [str(path) for path in site_files[:2]]
    recipe = make_recipe(**sections, simulation={"sites": sites}, output=str(tmp_path / "run"))
    digest = simulate(recipe, RunFolder(tmp_path / "run")).state_digest
    engines = [open_engine(make_recipe(**sections, data={"train": site})) for site in sites]
    state = engines[0].initial_state
    for _ in range(2):
        mean = FedAvg(engines[0].manifest)
        for engine in engines:
            engine.begin_round(state)
            report = engine.train(2)
            mean.add(engine.read_state(), report.weight)
        state = mean.result()
    for engine in engines:
        engine.close()
    assert state.digest == digest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "adafactor", "ademamix_8bit", "lion_8bit"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    recipe = make_recipe(training={"optim": name, "max_steps": 4}, tuning={"mode": "full"})
    whole, first, second = (open_engine(recipe) for _ in range(3))
    whole.train(4)
    first.train(2)
    first.checkpoint(tmp_path / "checkpoint")
    second.restore(tmp_path / "checkpoint")
    second.train(2)
    assert second.read_state().digest == whole.read_state().digest


@pytest.mark.parametrize("name", PACKAGED)
def test_a_package_that_lacks_is_named(make_recipe: MakeRecipe, name: str) -> None:
    recipe = make_recipe(training={"optim": name})
    with pytest.raises(InputError, match=f"training.optim: {name}: .*{PACKAGED[name]}"):
        build_optimizer(BaseModel(recipe).model, recipe, 1e-3)


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "adafactor", "lion_8bit"])
def test_moments_are_forgotten(make_recipe: MakeRecipe, name: str) -> None:
    engine = open_engine(make_recipe(tuning={"mode": "full"}, training={"optim": name}))
    engine.train(2)
    loop = engine._current
    loop.forget_moments()
    parameters = [parameter for group in loop.optimizer.param_groups for parameter in group["params"]]
    fresh = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    other = type(loop.optimizer)(
        [{**group, "params": [fresh.pop(0) for _ in group["params"]]} for group in loop.optimizer.param_groups]
    )
    again = [parameter for group in other.param_groups for parameter in group["params"]]
    for one, two in zip(parameters, again, strict=True):
        one.grad = two.grad = torch.ones_like(one)
    loop.optimizer.step()
    other.step()
    assert all(map(torch.equal, parameters, again))
    engine.close()


@pytest.mark.parametrize(("settings", "last"), [({}, 3), ({"decay_ratio": 0.5}, 5), ({"decay_ratio": 1.0}, 10)])
def test_a_rate_stays_and_then_falls_to_nothing(make_recipe: MakeRecipe, settings: dict[str, float], last: int) -> None:
    recipe = make_recipe(training={"lr_scheduler_type": "constant_then_linear", "lr_scheduler_kwargs": settings})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, recipe, 10)
    rates = []
    for _ in range(11):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0] * (10 - last) + [left / last for left in range(last, -1, -1)])


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in OWN_SCHEDULES])
@pytest.mark.parametrize("warm_up", [{"warmup_steps": 3}, {"warmup_ratio": 0.21}, {"warmup_steps": 0.21}])
def test_a_schedule_is_the_librarys_own(make_recipe: MakeRecipe, name: str, warm_up: dict[str, Any]) -> None:
    settings = SETTINGS.get(name, {})
    if name == "constant":
        idle = make_recipe(training={"lr_scheduler_type": name, **warm_up})
        assert any(line.startswith("training.warmup_steps: without effect under") for line in warnings_of(idle))
    recipe = make_recipe(training={"lr_scheduler_type": name, "lr_scheduler_kwargs": settings, **warm_up})
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2) for _ in range(2))
    expected = get_scheduler(
        name, theirs, num_warmup_steps=3, num_training_steps=14, scheduler_specific_kwargs=dict(settings)
    )
    schedule = build_schedule(ours, recipe, 14)
    for _ in range(14):
        assert schedule.get_last_lr() == expected.get_last_lr()
        for optimizer in (ours, theirs):
            optimizer.step()
        schedule.step()
        expected.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lomo"}, "optim: 'lomo' is not supported: it updates within the backward pass"),
        ({"optim": "schedule_free_adamw"}, "trains other weights than those that are evaluated"),
        ({"optim": "adam"}, "optim: there is no 'adam'; it can be adamw_torch, "),
        ({"optim_args": "momentum=0.9"}, "optim_args: optimizer adamw_torch reads none; leave it out"),
        (
            {"optim": "sgd", "optim_args": "beta=1"},
            "optim_args: 'beta=1' is nothing that sgd reads: NAME=VALUE, of mom",
        ),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: 'momentum' is nothing that sgd reads"),
        ({"lr_scheduler_type": "greedy"}, "a loss that differs from site to site"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "it waits for evaluations"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_kwargs: schedule cosine_with_min_lr needs min_lr or",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
            "lr_scheduler_kwargs: schedule constant has no settings",
        ),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "warmup_ratio: warmup_steps says the same"),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.1}, "warmup_ratio: warmup_steps says the same"),
        ({"save_steps": 0.1}, "training.save_steps: a whole number of steps, as a share of all .*, not 0.1"),
        ({"eval_steps": 0.1}, "training.eval_steps: a whole number of steps, as a share"),
        ({"logging_steps": 0.5}, "training.logging_steps: a whole number of steps, as a share"),
    ],
)
def test_what_cannot_be_had_says_why(make_recipe: MakeRecipe, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_recipe(training=settings)


def test_a_setting_that_a_schedule_has_not_is_named(make_recipe: MakeRecipe) -> None:
    for name, settings, said in (("cosine", {"cycles": 2}, "'cycles'"), ("polynomial", {"power": "abc"}, "str")):
        recipe = make_recipe(training={"lr_scheduler_type": name, "lr_scheduler_kwargs": settings})
        with pytest.raises(InputError, match=f"training.lr_scheduler_kwargs: .*{said}"):
            build_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), recipe, 10)


def test_the_factors_b_learn_faster_as_in_peft(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(tuning={"lora": {"loraplus_lr_ratio": 16}}, training={"weight_decay": 0.1})
    ours, theirs = BaseModel(recipe).model, BaseModel(recipe).model
    expected = create_loraplus_optimizer(
        model=theirs, optimizer_cls=torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    assert all(map(torch.equal, stepped(ours, build_optimizer(ours, recipe, 1e-2)), stepped(theirs, expected)))
    assert most_learning_rate(recipe) == pytest.approx(0.16)


def test_a_codec_that_clips_asks_how_far_an_optimizer_goes(make_recipe: MakeRecipe) -> None:
    from strategies.ring_scale import largest_change

    privacy: dict[str, Any] = {"codec": "ring16"}
    topology = {"kind": "federated", "rounds": 1, "local_steps": 4}
    known = make_recipe(privacy=privacy, topology=topology, training={"optim": "adamw_8bit"})
    assert largest_change(known) == largest_change(make_recipe(privacy=privacy, topology=topology))
    faster = make_recipe(privacy=privacy, topology=topology, tuning={"lora": {"loraplus_lr_ratio": 16}})
    assert largest_change(faster) == 16 * largest_change(known)
    for training in ({"optim": "adafactor"}, {"adam_beta2": 0.9}):
        with pytest.raises(InputError, match=r"privacy.clip: codec ring16 needs it with optim"):
            largest_change(make_recipe(privacy=privacy, topology=topology, training=training))


def test_the_names_are_those_of_the_arguments() -> None:
    arguments = SimpleNamespace(**vars(TrainingArguments("x", use_cpu=True, report_to="none")))
    for key in ("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs"):
        assert hasattr(arguments, key)
