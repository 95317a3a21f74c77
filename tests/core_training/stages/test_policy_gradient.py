"""PPO, RLOO and GRPO: their losses against independent ones, what a run learns, and that it stops and goes on."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from core_training.data.examples import Batch
from core_training.data.rows import SEQUENCE_TENSORS
from core_training.engine import central
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError
from core_training.models.results import load_reward_model
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.stages.policy_gradient import Part, PolicyGradientStage
from core_training.stages.rollout import Sampler
from tests import tiny

MakeRecipe = Callable[..., Recipe]
STAGES = ["ppo", "rloo", "grpo"]
JUDGE = """
def vowels(prompts, completions):
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def pretrained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a second of fine-tuning: it answers in words, and so can be moved by rewards."""
    folder = tmp_path_factory.mktemp("pretrained")
    tiny.write_jsonl(folder / "questions.jsonl", tiny.questions(0, 100))
    (folder / "judge.py").write_text(JUDGE)
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_model)},
            "stage": "sft",
            "tuning": {"mode": "full"},
            "data": {
                "train": str(folder / "questions.jsonl"),
                "columns": {"prompt": "question", "completion": "answer"},
                "eval_fraction": 0.0,
            },
            "training": {
                "learning_rate": 1e-2,
                "lr_scheduler_type": "linear",
                "per_device_train_batch_size": 16,
                "max_steps": 60,
            },
        }
    )
    engine = open_engine(recipe)
    engine.train(60)
    engine.save_model(folder / "model")
    return folder


@pytest.fixture
def rl_recipe(pretrained: Path, make_recipe: MakeRecipe) -> MakeRecipe:
    def make(stage: str, **sections: Any) -> Recipe:
        defaults: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(pretrained / "model")},
            "data": {"train": str(pretrained / "questions.jsonl"), "columns": {"prompt": "question"}},
            "training": {"per_device_train_batch_size": 8},
            "rollout": {"reward_function": f"{pretrained / 'judge.py'}:vowels", "max_new_tokens": 12},
        }
        return make_recipe(
            **{
                "stage": stage,
                **{name: defaults.get(name, {}) | sections.get(name, {}) for name in {**defaults, **sections}},
            }
        )

    return make


def rollout_of(engine: Engine) -> tuple[PolicyGradientStage, list[Part]]:
    """The engine's stage, and a rollout of its first prompts."""
    engine.launch()
    prepared, stage = engine._current.prepared, engine._stage
    assert isinstance(stage, PolicyGradientStage)
    (prompts,) = prepared.batches([engine._rows[i] for i in range(8)])
    parts = stage.roll_out(prepared, prompts)
    stage.credit(parts, stage.kl_coef, lambda tensor: tensor)
    return stage, parts


# What a first minibatch must give


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratio_is_exactly_1_whatever_the_dropout(rl_recipe: MakeRecipe, stage: str, checkpointing: bool) -> None:
    """One update a rollout: no token is off its sampled probability, before training and after some of it."""
    recipe = rl_recipe(
        stage,
        tuning={"mode": "lora", "lora": {"r": 4, "lora_dropout": 0.3}},
        training={"gradient_checkpointing": checkpointing},
        ppo={"num_ppo_epochs": 1, "cliprange": 1e-9},
        rloo={"cliprange": 1e-9},
        grpo={"cliprange": 1e-9},
    )
    engine = open_engine(recipe)
    first = engine.train(1).figures
    assert first["clip_fraction"][0] == 0
    assert first["kl"][0] == 0
    if stage == "ppo":
        assert abs(first["policy_loss"][0] / first["policy_loss"][1]) < 1e-6
    assert engine.train(3).figures["clip_fraction"][0] == 0
    trained, parts = rollout_of(engine)
    scores = trained.score(engine._base.model, parts[0])
    assert torch.equal(torch.exp(scores.logps - parts[0]["logps"]), torch.ones_like(scores.logps))
    assert float(trained.kl(parts[0]).abs().sum()) > 0


# Losses against independent ones


def answers_of(part: Batch) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each row, as lists of tokens."""
    pairs = []
    for ids, labels in zip(part["input_ids"].tolist(), part["labels"].tolist(), strict=True):
        start = next(i for i, label in enumerate(labels) if label != -100)
        pairs.append((ids[:start], [label for label in labels if label != -100]))
    return pairs


def by_row(model: Any, part: Batch, temperature: float) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Log-probabilities and values of each answer's tokens, from one whole forward for each row and no padding."""
    results = []
    for prompt, answer in answers_of(part):
        output = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logps = (output.logits[0, before] / temperature).log_softmax(-1)
        values = model.value_head(output.hidden_states[-1][0, before])[:, 0] if hasattr(model, "value_head") else None
        results.append((logps[torch.arange(len(answer)), answer], values))
    return results


def reference_ppo_loss(
    new: list[tuple[torch.Tensor, Any]],
    old: list[tuple[torch.Tensor, Any]],
    reference: list[tuple[torch.Tensor, Any]],
    rewards: list[float],
    settings: Any,
) -> torch.Tensor:
    """PPO's mean loss per token, token by token, straight from the papers."""
    advantages, returns = [], []
    for (logps, values), (reference_logps, _), reward in zip(old, reference, rewards, strict=True):
        length = len(logps)
        row = [0.0] * length
        carried = 0.0
        for t in reversed(range(length)):
            r = -settings.kl_coef * float(logps[t] - reference_logps[t]) + (reward if t == length - 1 else 0.0)
            following = float(values[t + 1]) if t + 1 < length else 0.0
            carried = r + settings.gamma * following - float(values[t]) + settings.gamma * settings.lam * carried
            row[t] = carried
        advantages.append(row)
        returns.append([a + float(v) for a, v in zip(row, values, strict=True)])
    flat = [a for row in advantages for a in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
    total = torch.zeros(())
    for i, (logps, values) in enumerate(new):
        for t in range(len(logps)):
            advantage = (advantages[i][t] - mean) / deviation
            ratio = (logps[t] - old[i][0][t]).exp()
            low, high = 1 - settings.cliprange, 1 + settings.cliprange
            policy = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
            old_value = float(old[i][1][t])
            near = values[t].clamp(old_value - settings.cliprange_value, old_value + settings.cliprange_value)
            value = 0.5 * torch.max((values[t] - returns[i][t]) ** 2, (near - returns[i][t]) ** 2)
            total = total + policy + settings.vf_coef * value
    return total / len(flat)


def perturb(engine: Engine, spread: float, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in engine._base.trainable_parameters.values():
            parameter.add_(spread * torch.randn_like(parameter))


def gradients(engine: Engine, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(engine._base.trainable_parameters.values()))
    return dict(zip(engine._base.trainable_parameters, found, strict=True))


@pytest.fixture
def off_policy(rl_recipe: MakeRecipe) -> Callable[..., Any]:
    """A rollout, and its tokens' scores row by row, with policy, sampling policy and reference all different."""

    def make(stage_name: str, **sections: Any) -> SimpleNamespace:
        engine = open_engine(rl_recipe(stage_name, tuning={"mode": "full"}, rollout={"temperature": 0.8}, **sections))
        model = engine._base.model.eval()
        start = engine.read_state()
        perturb(engine, 0.01)
        stage, (part,) = rollout_of(engine)
        sampling = engine.read_state()
        with torch.no_grad():
            old = by_row(model, part, 0.8)
            engine.begin_round(start)
            reference = by_row(model, part, 0.8)
        engine.begin_round(sampling)
        perturb(engine, 0.03, seed=1)
        return SimpleNamespace(
            engine=engine, stage=stage, part=part, old=old, reference=reference, new=by_row(model, part, 0.8)
        )

    return make


def assert_agrees(case: SimpleNamespace, expected: torch.Tensor) -> None:
    """Loss and every gradient."""
    result = case.stage.policy_loss(case.engine._base.model, case.part)
    clipped, count = result.figures["clip_fraction"]
    assert 0 < clipped < count  # both sides of the clip are taken
    loss = result.total / result.weight
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    actual, wanted = gradients(case.engine, loss), gradients(case.engine, expected)
    for name in actual:
        torch.testing.assert_close(actual[name], wanted[name], atol=1e-4, rtol=1e-4, msg=name)


def test_ppo_agrees_with_an_independent_implementation_on_a_fixed_rollout(off_policy: Callable[..., Any]) -> None:
    case = off_policy("ppo", ppo={"vf_coef": 0.5, "gamma": 0.9})
    rewards = case.part["rewards"].tolist()
    expected = reference_ppo_loss(case.new, case.old, case.reference, rewards, case.stage.recipe.ppo)
    assert_agrees(case, expected)


def test_rloo_agrees_with_its_closed_form(off_policy: Callable[..., Any]) -> None:
    """−mean over answers of min(r·A, clip(r)·A), r of the whole answer, A = R − mean of the others' R."""
    case = off_policy("rloo", rloo={"kl_coef": 0.3, "num_generations": 3})
    pieces = list(zip(case.part["rewards"].tolist(), case.old, case.reference, strict=True))
    rewards = [reward - 0.3 * float((old[0] - reference[0]).sum()) for reward, old, reference in pieces]
    terms = []
    for i, (logps, _) in enumerate(case.new):
        group = range(3 * (i // 3), 3 * (i // 3) + 3)
        advantage = rewards[i] - sum(rewards[j] for j in group if j != i) / 2
        ratio = (logps.sum() - case.old[i][0].sum()).exp()
        terms.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    assert_agrees(case, torch.stack(terms).mean())


def test_grpo_agrees_with_its_closed_form(off_policy: Callable[..., Any]) -> None:
    """Mean over tokens of −min(r·A, clip(r)·A) + β(e^d − d − 1), d = log π_ref/π, A the group's standard score."""
    case = off_policy("grpo", grpo={"kl_coef": 0.3, "num_generations": 4})
    rewards = case.part["rewards"].tolist()
    terms = []
    for i, (logps, _) in enumerate(case.new):
        group = rewards[4 * (i // 4) : 4 * (i // 4) + 4]
        advantage = (rewards[i] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
        ratio = (logps - case.old[i][0]).exp()
        difference = case.reference[i][0] - logps
        kl = difference.exp() - difference - 1
        terms.append(-torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.3 * kl)
    assert_agrees(case, torch.cat(terms).mean())


@pytest.mark.parametrize("stage", ["rloo", "grpo"])
def test_loss_is_that_of_trl(off_policy: Callable[..., Any], stage: str) -> None:
    """TRL's own loss method, given the same log-probabilities and advantages."""
    from accelerate import Accelerator
    from trl import GRPOTrainer, RLOOTrainer

    case = off_policy(stage)
    part, model = case.part, case.engine._base.model
    scores = case.stage.score(model, part)
    entropies = torch.zeros_like(scores.logps)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (scores.logps, entropies, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=Accelerator(cpu=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        beta=case.stage.kl_coef,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="dapo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    old = part["logps"] if stage == "grpo" else part["logps"].sum(dim=1)
    inputs = {
        "prompt_ids": part["input_ids"][:, :1],
        "prompt_mask": torch.ones_like(part["input_ids"][:, :1]),
        "completion_ids": part["input_ids"][:, 1 : 1 + scores.logps.shape[1]],
        "completion_mask": part["mask"].long(),
        "advantages": part["advantages"].flatten(),
        "old_logps": old,
        "old_per_token_logps": old,
        "ref_per_token_logps": part["reference_logps"],
        "num_items_in_batch": part["mask"].sum(),
    }
    expected = (GRPOTrainer if stage == "grpo" else RLOOTrainer)._compute_loss(trainer, model, inputs)
    result = case.stage.policy_loss(model, part)
    torch.testing.assert_close(result.total / result.weight, expected)


# Sums over batches and sites


class PerPrompt(Sampler):
    """Draws each prompt's answers from a seed of its own: what the others are has no influence."""

    def sample(self, model: Any, prompts: Batch, generations: int = 1) -> dict[str, torch.Tensor]:
        singles = []
        for i in range(len(prompts["input_ids"])):
            torch.manual_seed(int(prompts["input_ids"][i].sum()))
            row = {name: prompts[name][i : i + 1] for name in SEQUENCE_TENSORS}
            singles.append(super().sample(model, row, generations))
        width = max(single["input_ids"].shape[1] for single in singles)
        fill = {"input_ids": self.pad_token_id, "labels": -100, "position_ids": 0}
        padded = {
            name: torch.cat(
                [torch.nn.functional.pad(s[name], (0, width - s[name].shape[1]), value=fill[name]) for s in singles]
            )
            for name in ("input_ids", "labels")
        }
        padded["position_ids"] = torch.arange(width).repeat(len(padded["labels"]), 1)
        return padded | {"ended": torch.cat([single["ended"] for single in singles])}


def step_of(recipe: Recipe) -> tuple[float, np.ndarray]:
    """Weight and state after one step of SGD with fixed rollouts."""
    engine = open_engine(recipe)
    stage: Any = engine._stage
    stage.sampler = PerPrompt(**vars(stage.sampler))
    weight = engine.train(1).weight
    return weight, engine.read_state().buffer


@pytest.fixture
def one_step(rl_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., tuple[float, np.ndarray]]:
    def step(stage: str, first: int, last: int, pieces: int = 1, whiten: bool = True) -> tuple[float, np.ndarray]:
        data = tiny.write_jsonl(tmp_path / "part.jsonl", tiny.questions(0, 8)[first:last])
        recipe = rl_recipe(
            stage,
            tuning={"mode": "full"},
            data={"train": str(data), "columns": {"prompt": "question"}, "eval_fraction": 0.0},
            training={
                "per_device_train_batch_size": (last - first) // pieces,
                "gradient_accumulation_steps": pieces,
                "optim": "sgd",
                "max_grad_norm": 0.0,
                "learning_rate": 1.0,
            },
            ppo={"num_ppo_epochs": 1, "whiten_advantages": whiten},
        )
        return step_of(recipe)

    return step


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_accumulation_equals_one_large_rollout(one_step: Callable[..., Any], stage: str) -> None:
    """PPO's whitening too goes over all pieces."""
    whole, pieces = one_step(stage, 0, 8), one_step(stage, 0, 8, pieces=4)
    assert whole[0] == pieces[0]
    np.testing.assert_allclose(whole[1], pieces[1], atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_weighted_mean_of_two_sites_steps_is_the_step_on_all_prompts(one_step: Callable[..., Any], stage: str) -> None:
    """Law 2 with fixed rollouts. PPO's whitening goes over what a site has, so it is left out here."""
    ends = [(0, 3), (3, 8), (0, 8)]
    (w1, site1), (w2, site2), (w, together) = (one_step(stage, *part, whiten=False) for part in ends)
    assert w == w1 + w2
    np.testing.assert_allclose((w1 * site1 + w2 * site2) / w, together, atol=1e-5)


# Runs


@pytest.mark.parametrize(
    ("stage", "mode", "learning_rate"),
    [
        ("ppo", "full", 3e-3),
        ("ppo", "freeze", 1e-2),
        ("ppo", "lora", 1e-2),
        ("ppo", "qlora", 1e-2),
        ("rloo", "lora", 1e-2),
        ("grpo", "full", 3e-3),
    ],
)
def test_reward_rises(rl_recipe: MakeRecipe, stage: str, mode: str, learning_rate: float) -> None:
    """The share of vowels in what a pre-trained model says, from about 0.3; and exactly the trained parameters move."""
    recipe = rl_recipe(
        stage,
        tuning={"mode": mode, "lora": {"r": 8, "lora_alpha": 16}, "freeze": {"trainable_layers": 1}},
        training={"max_steps": 15, "learning_rate": learning_rate, "lr_scheduler_type": "linear"},
        ppo={"num_ppo_epochs": 2, "kl_coef": 0.01},
        rloo={"kl_coef": 0.01},
        grpo={"kl_coef": 0.01},
    )
    engine = open_engine(recipe)
    frozen = {n: p.detach().clone() for n, p in engine._base.model.named_parameters() if not p.requires_grad}
    before = engine.evaluate()["questions"].metrics["reward"]
    report = engine.train(15)
    after = engine.evaluate()["questions"]
    assert after.metrics["reward"] > before + 0.15
    assert after.loss == pytest.approx(-(after.metrics["reward"] - engine._stage.kl_coef * after.metrics["kl"]))
    assert all(torch.equal(p, frozen[n]) for n, p in engine._base.model.named_parameters() if n in frozen)
    assert {"reward", "kl", "entropy", "clip_fraction", "answer_length"} <= set(report.figures)


@pytest.mark.parametrize("stage", STAGES)
def test_restored_run_equals_the_one_that_was_never_stopped(rl_recipe: MakeRecipe, stage: str, tmp_path: Path) -> None:
    """Sampling, dropout and PPO's adaptive weight of the KL penalty go on where they were."""
    recipe = rl_recipe(
        stage,
        tuning={"mode": "lora", "lora": {"r": 4, "lora_dropout": 0.1}},
        training={"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        ppo={"num_mini_batches": 2, "num_ppo_epochs": 2, "kl_target": 0.5, "kl_horizon": 20.0},
    )
    engine = open_engine(recipe)
    engine.train(3)
    engine.checkpoint(tmp_path / "kept")
    whole = engine.train(3)
    again = open_engine(recipe)
    again.restore(tmp_path / "kept")
    rest = again.train(3)
    assert again.read_state().digest == engine.read_state().digest
    assert rest.figures == whole.figures


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_is_repeatable_and_changes_nothing(rl_recipe: MakeRecipe, stage: str) -> None:
    recipe = rl_recipe(stage)
    plain, asked = open_engine(recipe), open_engine(recipe)
    plain.train(2)
    asked.evaluate()
    asked.train(1)
    state, random = asked.read_state().digest, torch.get_rng_state()
    assert asked.evaluate() == asked.evaluate()
    assert asked.read_state().digest == state
    assert torch.equal(torch.get_rng_state(), random)
    asked.train(1)
    assert asked.read_state().digest == plain.read_state().digest


def test_adaptive_weight_holds_the_divergence_at_its_target(rl_recipe: MakeRecipe, tiny_model: Path) -> None:
    """0.3 nats an answer, of two tokens from a random base; without a penalty the run goes several times as far."""
    divergence = {}
    for coef, target in ((0.3, 0.3), (0.0, None)):
        recipe = rl_recipe(
            "ppo",
            model={"name_or_path": str(tiny_model)},
            tuning={"mode": "full"},
            training={
                "max_steps": 35,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": 32,
            },
            rollout={"max_new_tokens": 2},
            ppo={"kl_coef": coef, "kl_target": target, "kl_horizon": 100.0, "num_ppo_epochs": 2},
        )
        engine = open_engine(recipe)
        engine.train(15)
        total, count = engine.train(20).figures["kl"]
        divergence[target] = total / count
    assert 0.15 < divergence[0.3] < 0.6
    assert divergence[None] > 1.5


def test_an_answer_that_was_cut_is_penalised(rl_recipe: MakeRecipe) -> None:
    plain, penalised = (
        rollout_of(open_engine(rl_recipe("rloo", rollout={"max_new_tokens": 8, "missing_eos_penalty": penalty})))[1][0]
        for penalty in (None, 2.5)
    )
    assert 0 < plain["ended"].sum() < len(plain["ended"])
    torch.testing.assert_close(plain["rewards"] - penalised["rewards"], 2.5 * (~plain["ended"]).float())


@pytest.fixture
def train_judge(rl_recipe: MakeRecipe, tmp_path: Path) -> Callable[[int], Path]:
    """Trains a reward model on records of a seed, always by the same recipe and in the same run folder."""

    def train(seed: int) -> Path:
        pairs = [{"prompt": q["question"], "chosen": q["answer"], "rejected": "No."} for q in tiny.questions(seed, 12)]
        recipe = rl_recipe(
            "reward",
            data={"train": str(tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs)), "columns": {}, "eval_fraction": 0.0},
            training={"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 128},
        )
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        folder = RunFolder(tmp_path / "run")
        folder.prepare(recipe, resume=False)
        central.train(recipe, open_engine(recipe), folder)
        return folder.path

    return train


@pytest.mark.parametrize("padding", ["<|pad|>", None])
def test_a_reward_model_of_an_earlier_run_is_the_judge(
    rl_recipe: MakeRecipe, train_judge: Callable[[int], Path], pretrained: Path, tmp_path: Path, padding: str | None
) -> None:
    """Rewards are what the reward model, asked about one answer at a time, says of its last token.

    Also where the policy has no token for padding, and pads with the one that ends answers.
    """
    model = shutil.copytree(pretrained / "model", tmp_path / "policy")
    names = json.loads((model / "tokenizer_config.json").read_text()) | {"pad_token": padding}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    run = train_judge(0)
    engine = open_engine(
        rl_recipe(
            "grpo",
            model={"name_or_path": str(model)},
            rollout={"reward_model": str(run), "reward_function": None},
        )
    )
    _, (part,) = rollout_of(engine)
    judge = load_reward_model(run, engine._base.vocabulary_digest)
    assert len(set(part["mask"].sum(dim=1).tolist())) > 1
    for row, (prompt, answer) in enumerate(answers_of(part)):
        with torch.no_grad():
            expected = judge(input_ids=torch.tensor([prompt + answer])).logits[0, 0]
        torch.testing.assert_close(part["rewards"][row], expected, atol=1e-5, rtol=1e-4)
    assert engine.train(1).figures["reward"][1] == len(part["rewards"])


def test_sites_must_have_the_judge_in_common_and_a_new_one_in_its_place_is_seen(
    rl_recipe: MakeRecipe, train_judge: Callable[[int], Path], tmp_path: Path
) -> None:
    def judged_by(run: Path) -> tuple[str, float]:
        engine = open_engine(rl_recipe("grpo", rollout={"reward_model": str(run), "reward_function": None}))
        tokens = {name: torch.tensor([[1, 3, 50, 51, 4, 60, 61, 2]]) for name in ("input_ids", "labels")}
        stage: Any = engine._stage
        return engine.initial_digest, float(stage.judge(tokens | {"position_ids": torch.arange(8)[None]}).total)

    run = train_judge(0)
    copy = shutil.copytree(run, tmp_path / "copy")
    first = judged_by(run)
    another = judged_by(train_judge(1))
    assert another[0] != first[0]
    assert another[1] != first[1]
    assert judged_by(copy) == first
    by_function = open_engine(rl_recipe("grpo"))
    assert by_function.initial_digest == by_function._base.initial_digest not in (first[0], another[0])


# Bad input


def test_more_minibatches_than_prompts_are_refused(rl_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"ppo\.num_mini_batches: 9 minibatches .* \(8\) prompts"):
        open_engine(rl_recipe("ppo", ppo={"num_mini_batches": 9}))


def test_prompts_that_leave_no_room_for_the_answer_are_refused(rl_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"questions.jsonl.* a prompt of \d+ tokens .*\(250\) exceed the 256 tokens"):
        open_engine(rl_recipe("grpo", rollout={"max_new_tokens": 250}))


def test_a_prompt_over_max_length_keeps_its_end_and_is_counted(rl_recipe: MakeRecipe) -> None:
    engine = open_engine(rl_recipe("grpo", training={"max_length": 4}))
    engine.launch()
    assert engine.data_report.truncated == 100
    assistant = engine._base.tokenizer.convert_tokens_to_ids("<|assistant|>")
    rows = engine._rows
    assert all(rows[i][0].sequences[0].input_ids[-1] == assistant for i in range(5))


def test_the_reward_function_is_tried_before_training(rl_recipe: MakeRecipe, pretrained: Path) -> None:
    (pretrained / "none.py").write_text("def judge(prompts, completions):\n    return []\n")
    with pytest.raises(InputError, match=r"none.py:judge returned 0 numbers for 2 completions"):
        open_engine(rl_recipe("grpo", rollout={"reward_function": f"{pretrained / 'none.py'}:judge"}))
