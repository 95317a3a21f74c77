"""From pre-training to PPO, run by run: each starts from the run before it, and the last raises what people wanted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.engine.central import train
from core_training.engine.engine import Engine, open_engine
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from tests import tiny

MakeRecipe = Callable[..., Recipe]
pytestmark = pytest.mark.slow


def answers(seed: int, count: int, vowels: float) -> list[str]:
    """Made-up words, in which a letter is a vowel with this probability."""
    draw = random.Random(seed)
    return [
        "".join(draw.choice("aeiou" if draw.random() < vowels else "bcdfglmnprst") for _ in range(10))
        for _ in range(count)
    ]


def vowel_share(engine: Engine) -> float:
    """The true reward: what share of the policy's held-out answers is vowels, by a function and not by the judge."""
    return next(iter(engine.evaluate().values())).metrics["reward"]


@pytest.fixture
def ended(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., tuple[Recipe, Summary]]:
    """Run a stage to its end in a run folder of its own, starting from an earlier one."""

    def run(stage: str, records: list[dict[str, Any]], after: list[str], mode: str = "full", **sections: Any) -> Any:
        data = tiny.write_jsonl(tmp_path / f"{stage}.jsonl", records)
        recipe = make_recipe(
            stage=stage,
            data={"train": str(data), "columns": {}},
            tuning={"mode": mode, "lora": {"r": 8, "lora_alpha": 16}},
            output=str(tmp_path / "runs" / stage),
            model={"adapters": [str(tmp_path / "runs" / one) for one in after]},
            **{
                **sections,
                "training": {"per_device_train_batch_size": 16, "max_steps": 60, **sections.get("training", {})},
            },
        )
        folder = RunFolder(Path(recipe.output))
        folder.prepare(recipe, resume=False)
        engine = open_engine(recipe)
        summary = train(recipe, engine, folder)
        engine.close()
        return recipe, summary

    return run


def test_pretrain_sft_reward_ppo_raises_the_true_reward(
    ended: Callable[..., tuple[Recipe, Summary]], tmp_path: Path
) -> None:
    prompts = [record["question"] for record in tiny.questions(0, 80)]
    words = answers(1, 80, 0.45)
    ended("pretrain", [{"text": f"{p} {w}"} for p, w in zip(prompts, words, strict=True)], [])
    ended("sft", [{"prompt": p, "completion": w} for p, w in zip(prompts, words, strict=True)], ["pretrain"])

    good, bad = answers(2, 400, 0.75), answers(3, 400, 0.2)
    pairs = [
        {"prompt": prompts[i % 80], "chosen": better, "rejected": worse}
        for i, (better, worse) in enumerate(zip(good, bad, strict=True))
    ]
    _, judge = ended("reward", pairs, ["sft"], "lora", training={"max_steps": 80, "learning_rate": 1e-2})
    assert judge.metrics["accuracy"] > 0.9

    rollout = {"reward_model": str(tmp_path / "runs" / "reward"), "max_new_tokens": 10}
    recipe, _ = ended(
        "ppo",
        [{"prompt": prompt} for prompt in prompts],
        ["sft"],
        "lora",
        rollout=rollout,
        ppo={"num_ppo_epochs": 2, "kl_coef": 0.01},
        training={"max_steps": 25, "learning_rate": 2e-2},
    )
    # The same evaluation with the true reward in the judge's place, of the first policy and of the last one.
    (tmp_path / "true.py").write_text(
        "def share(prompts, completions):\n"
        "    return [sum(c in 'aeiou' for c in text) / max(1, len(text)) for text in completions]\n"
    )
    truly = {"reward_model": None, "reward_function": f"{tmp_path / 'true.py'}:share"}
    first = open_engine(recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=truly)}))
    before = vowel_share(first)
    last = RunFolder(Path(recipe.output)).checkpoints
    first.restore(max(last.glob("step-*")))
    after = vowel_share(first)
    assert after > before + 0.1, (before, after)
