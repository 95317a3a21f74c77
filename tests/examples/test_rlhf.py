"""The chain from pre-training to PPO, cut short: nothing is learnt, but every step starts from those before it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.runs.run_folder import RunFolder
from examples.rlhf.__main__ import make
from examples.rlhf.careful import CAUTION, careful
from experiments.carrying_out import carry_out
from experiments.documents import load_mapping
from experiments.pipeline import load_pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "rlhf"
SHORT: dict[str, dict[str, Any]] = {
    "pretrain": {"training.max_steps": 3},
    "judged": {"rollout.reward_function": f"{EXAMPLE / 'careful.py'}:careful", "rollout.max_new_tokens": 4},
    "sft": {"topology.rounds": 1, "topology.local_steps": 1},
    "reward": {"topology.rounds": 1, "topology.local_steps": 1},
    "dpo": {"topology.rounds": 1, "topology.local_steps": 1},
    "ppo": {"topology.rounds": 1, "topology.local_steps": 1, "rollout.max_new_tokens": 4},
    "grpo": {"topology.rounds": 1, "topology.local_steps": 1, "rollout.max_new_tokens": 4},
}


def shortened(name: str) -> Path:
    """The example's pipeline with few steps, and gates that a model which learnt nothing passes."""
    document = load_mapping(EXAMPLE / name, "pipeline")
    for step in document["steps"].values():
        if "compare" in step:
            judge = str(step["judge"])
            own = str(EXAMPLE / judge) if judge.startswith("careful") else judge
            step |= {"judge": own, "max_tokens": 4, "limit": 6, "gates": {"win_rate": ">= 0"}}
            continue
        recipe = step["recipe"].removesuffix(".yaml")
        step["recipe"] = str(EXAMPLE / step["recipe"])
        step["set"] = {**step.get("set", {}), **SHORT[recipe], "data.max_samples": 30}
        step["gates"] = dict.fromkeys(step.get("gates", {}), ">= 0")
    path = Path(name)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.slow
def test_every_step_starts_from_those_before_it_and_alternatives_do_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make()
    carried = carry_out(load_pipeline(shortened("pipeline.yaml")), lambda _: nullcontext(lambda *_: None))
    assert carried.ended_by is None
    assert {one.status for one in carried.outcomes} == {"done"}
    runs = Path("runs/rlhf")
    started = {name: RunFolder(runs / name).recipe for name in ("sft", "reward", "ppo")}
    assert {recipe.topology.kind for recipe in started.values()} == {"federated"}
    assert started["ppo"].rollout.reward_model == str(runs / "reward")
    assert started["ppo"].model.adapters == [str(runs / "sft")]
    assert started["sft"].model.name_or_path == str(runs / "pretrain" / "model")

    again = carry_out(load_pipeline(shortened("alternatives.yaml")), lambda _: nullcontext(lambda *_: None))
    assert again.ended_by is None
    done = [one.name for one in again.outcomes if one.status == "done"]
    assert done == ["grpo", "dpo", "grpo-judged", "dpo-judged", "all-of-them"]


def test_the_true_reward_is_for_the_caution_alone() -> None:
    assert careful(["", "", ""], [f" {CAUTION} Take one drop.", "Take one drop.", "Ask"]) == [1.0, 0.0, 0.0]


def test_the_steps_that_both_pipelines_have_are_the_same() -> None:
    first, second = (
        load_mapping(EXAMPLE / name, "pipeline")["steps"] for name in ("pipeline.yaml", "alternatives.yaml")
    )
    assert first.items() <= second.items()  # else the second would train again what the first has done
