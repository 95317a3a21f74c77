"""Parts of other packages: found by their entry point, and trained with as if they were fedloom's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny

pytestmark = pytest.mark.slow

LIGHT = '''
from pydantic import Field

from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart


class Smooth(Section):
    """Stage `smooth`: fine-tuning with smoothed labels."""

    smoothing: float = Field(0.1, description="Share of the loss that is the same for all tokens.")


SMOOTH = StagePart[Smooth](
    name="smooth",
    target="their_work:SmoothStage",
    settings=Smooth,
    reads="conversation",
    unit="tokens",
    learning_rate=2e-5,
    adapter_learning_rate=1e-2,
)
'''

WORK = """
import torch.nn.functional as F

from core_training.stages.base import BatchLoss
from core_training.stages.language import labelled_logits
from core_training.stages.sft import Sft
from their_parts import SMOOTH


class SmoothStage(Sft):
    def loss(self, model, batch):
        logits, labels = labelled_logits(model, batch)
        smoothing = self.recipe.settings(SMOOTH).smoothing
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
        tokens = (labels != -100).sum()
        return BatchLoss(total, tokens, tokens)
"""


def install(folder: Path, entries: str) -> Path:
    """Leave in `folder` what pip would: two modules, and the metadata that names the parts."""
    (folder / "their_parts.py").write_text(LIGHT, encoding="utf-8")
    (folder / "their_work.py").write_text(WORK, encoding="utf-8")
    metadata = folder / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[fedloom.stages]\n{entries}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("theirs"), "smooth = their_parts:SMOOTH")


def fedloom(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, with the package on the path."""
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "fedloom.cli", *words]
    root = Path(__file__).parents[1]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": path}, timeout=250
    )


def write_recipe(folder: Path, **sections: Any) -> str:
    model = tiny.make_model(folder / "model")
    sites = [str(tiny.write_jsonl(folder / f"site-{n}.jsonl", tiny.questions(n, 24))) for n in (1, 2)]
    recipe = {
        "model": {"name_or_path": str(model)},
        "stage": "smooth",
        "data": {"columns": {"prompt": "question", "completion": "answer"}, "eval_fraction": 0.3},
        "simulation": {"sites": sites},
        "output": str(folder / "run"),
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("kind", "command"), [("central", "train"), ("federated", "simulate"), ("gossip", "simulate")])
def test_a_stage_of_another_package_trains_in_every_topology(
    package: Path, tmp_path: Path, kind: str, command: str
) -> None:
    recipe = write_recipe(
        tmp_path,
        smooth={"smoothing": 0.2},
        topology={"kind": kind, "rounds": 2, "local_steps": 3},
        privacy={"codec": "ring16"},
    )
    done = fedloom(package, command, recipe, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["stage"] == "smooth"
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert summary["eval_loss"] < summary["eval_loss_initial"]


def test_a_recipe_is_checked_and_begun_with_the_keys_of_another_packages_stage(package: Path, tmp_path: Path) -> None:
    wrong = fedloom(package, "recipe", "check", write_recipe(tmp_path, smooth={"smothing": 0.2}))
    assert wrong.returncode == 2
    assert "smooth.smothing: unknown key; did you mean 'smoothing'?" in wrong.stderr
    begun = fedloom(package, "recipe", "new", "--stage", "smooth")
    assert "smoothing: 0.1  # Share of the loss" in begun.stdout, begun.stderr
    shown = fedloom(package, "recipe", "schema", "--markdown")
    assert "| `smoothing` | float |" in shown.stdout


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("any = their_parts:SMOOTH", None),
        ("first = their_parts:SMOOTH\nsecond = their_parts:SMOOTH", "'second' of fedloom.stages"),
        ("smooth = their_parts:NOTHING", "cannot be loaded: AttributeError"),
        ("smooth = their_parts:Smooth", "has to be a StagePart"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(tmp_path: Path, entry: str, said: str | None) -> None:
    done = fedloom(install(tmp_path, entry), "recipe", "check", write_recipe(tmp_path))
    assert done.returncode == (0 if said is None else 2), done.stderr
    assert said is None or (said in done.stderr and "Traceback" not in done.stderr)
