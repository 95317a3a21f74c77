"""A finished run for evaluations, with records held out, and questions in the formats that people have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny

ABSTRACTS = [
    "Fever of the heart was seen.",
    "Cough of the lung, at length and again, was seen in the liver ward.",
    "Pain.",
]


def pubmedqa(count: int) -> dict[str, dict[str, Any]]:
    """Made-up questions as PubMedQA has them, prompts of unequal length."""
    return {
        str(100 + i): {
            "QUESTION": f"Does case {i} go to the {tiny.ORGANS[i % 10]} ward?",
            "CONTEXTS": [ABSTRACTS[i % 3]] * (1 + i % 2),
            "LONG_ANSWER": "It does.",
            "final_decision": ("yes", "no", "yes", "maybe")[i % 4],
            "YEAR": str(2000 + i % 2),
        }
        for i in range(count)
    }


@pytest.fixture(scope="session")
def pubmedqa_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "pubmedqa.json"
    path.write_text(json.dumps(pubmedqa(16)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(tiny_model: Path, site_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a few steps on three sites' records."""
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train
    from core_training.recipe.reading import parse_recipe
    from core_training.runs.run_folder import RunFolder

    folder = RunFolder(tmp_path_factory.mktemp("evaluated") / "run")
    document = {
        "model": {"name_or_path": str(tiny_model)},
        "stage": "sft",
        "tuning": {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}},
        "data": {
            "train": [str(path) for path in site_files],
            "columns": {"prompt": "question", "completion": "answer"},
            "eval_fraction": 0.3,
        },
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 64, "max_steps": 8},
    }
    recipe = parse_recipe(yaml.safe_dump(document))
    with opened_engine(recipe) as engine:
        folder.prepare(recipe, resume=False)
        train(recipe, engine, folder)
    return folder.path
