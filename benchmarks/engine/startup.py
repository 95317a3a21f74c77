"""How long `fedloom train` takes to the end of its first optimizer step, beside importing the libraries it stands on.

Both are processes of their own, timed from before they are started: the one ends its imports, the other is the command
itself, whose `events.jsonl` says when the step was done. They take turns. The step is the example recipe's (8 rows of
at most 128 tokens) on a few records, as reading and the evaluation before the first step grow with the data.
"""

from __future__ import annotations

import gzip
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from itertools import islice
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.fresh_process import ROOT
from benchmarks.places import Places
from core_training.foundation.errors import RunError
from core_training.runs.events import StepsTrained
from core_training.runs.run_folder import RunFolder

TARGET = 1.2
TURNS = 8
WARM_UP_TURNS = 1
RECORDS = 20
IMPORTS = """
import torch, transformers, peft
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
"""
"""What any LoRA training of a Llama imports; transformers imports nothing of a model before it is named."""


def measure(places: Places) -> Figure:
    ours: list[float] = []
    imports: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        recipe = _write_recipe(places, Path(name))
        for turn in range(TURNS):
            imports.append(_seconds_of_imports())
            ours.append(_seconds_to_first_step(recipe, Path(name) / f"run-{turn}"))
    del imports[:WARM_UP_TURNS], ours[:WARM_UP_TURNS]
    return Figure(
        name="startup",
        meaning="time of `fedloom train` to the end of its first step, relative to importing torch, transformers, peft",
        value=statistics.median(our / their for our, their in zip(ours, imports, strict=True)),
        unit="",
        target=TARGET,
        details={
            "seconds_to_first_step": ours,
            "seconds_of_imports": imports,
            "ratio_of_the_shortest": min(ours) / min(imports),
        },
    )


def _write_recipe(places: Places, folder: Path) -> Path:
    with gzip.open(places.sites["cdc"], "rt", encoding="utf-8") as lines:
        (folder / "records.jsonl").write_text("".join(islice(lines, RECORDS)), encoding="utf-8")
    recipe = places.recipe(f"data.train={folder / 'records.jsonl'}", "training.max_steps=1", name="central")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return folder / "recipe.yaml"


def _seconds_of_imports() -> float:
    began = time.time()
    code = f"{IMPORTS}\nimport time\nprint(time.time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout) - began


def _seconds_to_first_step(recipe: Path, run: Path) -> float:
    began = time.time()
    command = [sys.executable, "-m", "fedloom.cli", "train", str(recipe), "--out", str(run), "--quiet"]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False, cwd=ROOT).returncode != 0:
        raise RunError("fedloom train failed; what it wrote above says why")
    trained = next(RunFolder(run).lines(StepsTrained.NAME))
    return datetime.fromisoformat(trained["time"]).timestamp() - began
