"""Multiple choice beside lm-evaluation-harness: the same task files and model, in memory, processor time of one thread.

The harness is installed into an environment of its own, from the package index. Where all choices are single tokens it
computes a prompt once as well, and the two are about as fast (1.2 measured); these tasks have longer ones. A difference
of log-likelihoods above 1e-4, or of an accuracy's last digit, is no figure but an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import venv
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from benchmarks.figure import Figure
from benchmarks.places import OUTPUT, Places
from core_training.data.records import records_in
from core_training.foundation.errors import RunError
from evaluation.answers.prompts import continued
from evaluation.answers.scoring import Scorer
from evaluation.answers.subjects import load_subject
from evaluation.tasks.loading import load_task

RELEASE = "0.4.13"
ITEMS, WORDS, ROUNDS = 60, 150, 3
TARGET = 2.5
CHOICES = {
    "answered": ["yes", "no", "maybe"],
    "kind": ["what it is", "what causes it", "which symptoms it has", "how it is treated"],
    "focus": [],
}
"""The tasks; of `focus` each item has choices of its own: what its record and three others are about."""


def measure(places: Places) -> Iterator[Figure]:
    python = _installed()
    with tempfile.TemporaryDirectory() as folder:
        files = _written(places, Path(folder))
        theirs = _theirs(python, places.model, Path(folder))
        seconds, far = _ours(places.model, files, theirs)
    yield Figure(
        name="harness_choices",
        meaning="items of multiple choice a second, relative to lm-evaluation-harness",
        value=median(theirs["seconds"]) / median(seconds),
        unit="",
        target=TARGET,
        at_least=True,
        details={"release": RELEASE, "theirs": theirs["seconds"], "ours": seconds, "accuracy": theirs["accuracy"]},
    )
    yield Figure(
        name="harness_difference",
        meaning="largest difference of a choice's log-likelihood to lm-evaluation-harness's",
        value=far,
        unit="",
        target=1e-5,
        at_least=False,
        details={"accuracies": "equal to the last digit", "tasks": list(CHOICES)},
    )


def _written(places: Places, folder: Path) -> dict[str, Path]:
    """Task files and their items, as people have them for the harness."""
    records = list(islice(records_in(str(places.data)), 10 * ITEMS))[::10]
    files = {}
    focuses = [str(one.fields["focus"]) for one in records]
    for name, given in CHOICES.items():
        choices = [given or [focuses[(number + step) % len(records)] for step in (0, 7, 19, 31)]
                   for number in range(len(records))]  # fmt: skip
        items = [
            {
                "text": " ".join(one.fields["answer"].split()[:WORDS])
                + f"\nQuestion: {one.fields['question']}\nAnswer:",
                "choices": choices[number],
                "gold": number % len(choices[number]) if given else 0,
            }
            for number, one in enumerate(records)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        task: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return files


def _ours(model: Path, files: dict[str, Path], theirs: dict[str, Any]) -> tuple[list[float], float]:
    """The processor time of each round, and the largest difference. Raises RunError for what is no rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    subject, seconds, far = load_subject(str(model)), [], 0.0
    try:
        for _ in range(ROUNDS):
            began = time.process_time()
            for name, file in files.items():
                task = load_task(str(file))
                asked = [continued(task, item, item.choices, subject) for item in task.items]
                scored = {one.id: one for batch in Scorer(subject).scored(asked) for one in batch}
                logps = [scored[item.id].logps for item in task.items]
                right = [one.index(max(one)) == item.gold for one, item in zip(logps, task.items, strict=True)]
                accuracy = sum(right) / len(right)
                if accuracy != theirs["accuracy"][name]:
                    raise RunError(f"{name}: accuracy {accuracy}, theirs {theirs['accuracy'][name]}")
                pairs = zip(logps, theirs["logps"][name], strict=True)
                far = max(far, *(abs(a - b) for mine, other in pairs for a, b in zip(mine, other, strict=True)))
            seconds.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    if far > 1e-4:
        raise RunError(f"log-likelihoods differ by {far}")
    return seconds, far


def _theirs(python: Path, model: Path, tasks: Path) -> dict[str, Any]:
    side = Path(__file__).with_name("harness_side.py")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    command = [str(python), str(side), str(model), str(tasks), str(ROUNDS), *CHOICES]
    finished = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RunError(f"lm-evaluation-harness failed: {finished.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def _installed() -> Path:
    """The Python of the harness's environment, made where there is none, with the PyTorch that ours has."""
    folder = (OUTPUT / "harness").absolute()
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    venv.create(folder, clear=True, with_pip=True)
    same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers", "accelerate")]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, f"lm_eval[hf]=={RELEASE}", *same], check=True)
    done.touch()
    return python
