"""The cells of the matrix: for each stage and tuning mode a recipe, and sites' files to run it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from tests import tiny
from tests.core_training import preference_data
from tests.core_training.stages.test_stage_losses import SETTINGS

TOPOLOGIES = ("central", "federated", "gossip", "secure")
CELLS = [(stage, mode) for stage in STAGES for mode in TUNING_MODES]
SAMPLE = {
    topology: [
        (stage, mode)
        for row, stage in enumerate(STAGES)
        for column, mode in enumerate(TUNING_MODES)
        if (row + column) % len(TOPOLOGIES) == number
    ]
    for number, topology in enumerate(TOPOLOGIES)
}
"""The cells of each topology that the suite tries: each stage with each mode once, and in each topology; `make matrix`
tries all."""
SAMPLED = [stage for stage, entry in STAGES.items() if entry.samples]
STEPS = 6

JUDGE = """
def score(prompts, completions):
    return [sum(map(ord, text)) % 7 / 7.0 for text in completions]
"""


@dataclass(frozen=True)
class Workplace:
    """Where a session's cells find their model and files."""

    folder: Path
    model: Path

    def site(self, stage: str, number: int) -> Path:
        """A site's file for a stage; sites differ in content and size."""
        path = self.folder / stage / f"site{number}.jsonl"
        return path if path.exists() else tiny.write_jsonl(path, records(stage, number, 6 + 3 * number))

    def recipe(self, stage: str, mode: str, sites: int = 1, dropout: float = 0.1, **sections: Any) -> Recipe:
        """The cell's recipe on the files of its first sites; keyword arguments extend its sections."""
        judge = self.folder / "judge.py"
        judge.write_text(JUDGE)
        files = [str(self.site(stage, number)) for number in range(sites)]
        document: dict[str, Any] = {
            "model": {"name_or_path": str(self.model)},
            "stage": stage,
            "tuning": {
                "mode": mode,
                "lora": {"r": 2, "lora_alpha": 8, "lora_dropout": dropout},
                "freeze": {"trainable_layers": 1},
                "vera": {"r": 4},
            },
            "data": {"train": files, "eval_fraction": 0.0},
            "training": {
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 4,
                "max_length": 48,
                "max_steps": STEPS,
                "packing": False,
            },
            "simulation": {"sites": files},
        }
        if stage in SAMPLED:
            document["rollout"] = {"reward_function": f"{judge}:score", "max_new_tokens": 5}
            document["training"]["max_length"] = 32
        if stage in SETTINGS:
            document[stage] = SETTINGS[stage]
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section}
        return parse_recipe(yaml.safe_dump(document))


def records(stage: str, seed: int, count: int) -> list[dict[str, Any]]:
    """What a site has for a stage."""
    if stage in SAMPLED:
        return [{"prompt": record["question"]} for record in tiny.questions(seed, count)]
    return preference_data.records(stage, seed, count)
