"""Tokens a second and peak memory of `fedloom train`, against `llamafactory-cli train`, on the same records.

LoRA (rank 8, all linear layers) of one model in batches of 8, as both have by default; what the comparison does not
name stays at each side's default. Two shapes: records of their natural lengths, which ours packs into rows and
LLaMA-Factory pads; and records that are all cut to full rows. Each side is its own command in a process of its own,
with the libraries that its release asks for: LLaMA-Factory is installed once, into an environment of its own. The sides
take turns.

Tokens are those of the records after the cut, prompts included and padding not; both sides must have seen as many.
Seconds are those of the training alone. Memory is the most that the process ever held, beyond what it holds once it has
imported what it trains with; `whole_ratios` are those of all that it held. `profile` says what a step of ours is made
of.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.engine.matmuls import profiled
from benchmarks.figure import Figure
from benchmarks.fresh_process import ROOT, in_fresh_process, peak_bytes
from benchmarks.places import OUTPUT, Places
from core_training.data.records import Record, read_records
from core_training.foundation.environment import SETTINGS
from core_training.foundation.errors import RunError
from core_training.recipe.llamafactory_data import INFO_FILE

MAX_LENGTH = 512
EPOCHS = 2
TURNS = 3
THREADS = 2
NATURAL_PER_SITE = 16
FULL_PER_SITE = 8
CANDIDATES_PER_SITE = 256
"""Records of a site that are looked at for full rows."""


@dataclass(frozen=True)
class Targets:
    """Tokens a second and memory, ours over theirs."""

    speed: float
    memory: float


SHAPES = {"natural": Targets(2.0, 0.50), "full": Targets(1.25, 0.75)}


@dataclass(frozen=True)
class Run:
    """A training run of one side."""

    tokens_per_second: float
    peak_bytes: int
    """The most that the process held, libraries included."""
    load_average: float
    """The machine's, over the minute before the run ended."""


def measure(places: Places) -> Iterator[Figure]:
    python = _installed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [str(file) for file in places.sites.values()]
        tokens = in_fresh_process(write_records, model=str(places.model), files=files, folder=name).result
        for shape, targets in SHAPES.items():
            turns = [
                (_ours(places, folder, shape, tokens[shape]), _theirs(python, places, folder, shape, tokens[shape]))
                for _ in range(TURNS)
            ]
            profile = in_fresh_process(profile_step, recipe=_our_recipe(places, folder, shape)).result
            yield from _figures(shape, targets, turns, {**asdict(_Before.of(python)), "profile": profile})


@dataclass(frozen=True)
class _Before:
    """What both sides are before they train: LLaMA-Factory's release, and the bytes that their imports take."""

    release: str
    our_bytes: int
    their_bytes: int

    @classmethod
    def of(cls, python: Path) -> _Before:
        release = "from importlib.metadata import version; print(version('llamafactory'))"
        return cls(
            _printed_by(python, release),
            int(_printed_by(Path(sys.executable), _OUR_IMPORTS + _RESIDENT)),
            int(_printed_by(python, _THEIR_IMPORTS + _RESIDENT)),
        )


_OUR_IMPORTS = """
from core_training.models.libraries import own_the_process, settle_libraries
own_the_process()
settle_libraries()
import core_training.engine.engine, transformers.models.llama.modeling_llama
"""
_THEIR_IMPORTS = """
import llamafactory.train.tuner, transformers.models.llama.modeling_llama
"""
_RESIDENT = """
from pathlib import Path
status = Path("/proc/self/status").read_text(encoding="utf-8")
print(1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]))
"""


def _printed_by(python: Path, code: str) -> str:
    """The last line that a program prints."""
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout.strip().splitlines()[-1]


def _figures(
    shape: str, targets: Targets, turns: Sequence[tuple[Run, Run]], before: dict[str, Any]
) -> Iterator[Figure]:
    details = {
        **before,
        "whole_ratios": [ours.peak_bytes / theirs.peak_bytes for ours, theirs in turns],
        "ours": [asdict(ours) for ours, _ in turns],
        "theirs": [asdict(theirs) for _, theirs in turns],
    }
    yield Figure(
        name=f"llamafactory_{shape}_speed",
        meaning=f"tokens/s of LoRA sft, {shape} lengths, relative to LLaMA-Factory",
        value=statistics.median(ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in turns),
        unit="",
        target=targets.speed,
        at_least=True,
        details=details,
    )
    yield Figure(
        name=f"llamafactory_{shape}_memory",
        meaning=f"peak memory of LoRA sft, {shape} lengths, relative to LLaMA-Factory",
        value=statistics.median(
            (ours.peak_bytes - before["our_bytes"]) / (theirs.peak_bytes - before["their_bytes"])
            for ours, theirs in turns
        ),
        unit="",
        target=targets.memory,
        details=details,
    )


def write_records(model: str, files: list[str], folder: str) -> dict[str, int]:
    """Write each shape's records as a data set of LLaMA-Factory's; returns their tokens in an epoch."""
    candidates = [list(islice(read_records(Path(file)), CANDIDATES_PER_SITE)) for file in files]
    lengths = [_lengths(model, records) for records in candidates]
    chosen: dict[str, list[tuple[Record, int]]] = {"natural": [], "full": []}
    for records, tokens in zip(candidates, lengths, strict=True):
        counted = list(zip(records, tokens, strict=True))
        chosen["natural"] += counted[:NATURAL_PER_SITE]
        chosen["full"] += [one for one in counted if one[1] == MAX_LENGTH][:FULL_PER_SITE]
    for shape, examples in chosen.items():
        lines = [
            {"instruction": one.fields["question"], "input": "", "output": one.fields["answer"]} for one, _ in examples
        ]
        (Path(folder) / f"{shape}.json").write_text(json.dumps(lines), encoding="utf-8")
    info = {shape: {"file_name": f"{shape}.json"} for shape in chosen}
    (Path(folder) / INFO_FILE).write_text(json.dumps(info), encoding="utf-8")
    return {shape: sum(tokens for _, tokens in examples) for shape, examples in chosen.items()}


def _lengths(model: str, records: Sequence[Record]) -> list[int]:
    """The tokens of each record after the cut."""
    from core_training.engine.dataset import load_dataset
    from core_training.models.base_model import BaseModel
    from core_training.recipe.reading import parse_recipe
    from core_training.stages.base import load_stage

    columns = {"prompt": "question", "completion": "answer"}
    document = _recipe(model, {"train": "unused", "columns": columns}, packing=False)
    recipe = parse_recipe(json.dumps(document))
    rows = load_dataset(recipe, load_stage(recipe, BaseModel(recipe)), records).rows
    return [len(example) for (example,) in rows]


def _recipe(model: str, data: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": model},
        "stage": "sft",
        "data": {**data, "eval_fraction": 0.0},
        "training": {"max_length": MAX_LENGTH, "num_train_epochs": EPOCHS, **training},
    }


def profile_step(recipe: str) -> dict[str, Any]:
    """What our third step is made of."""
    from core_training.engine.engine import open_engine
    from core_training.recipe.reading import parse_recipe

    engine = open_engine(parse_recipe(recipe))
    engine.launch()
    engine.train(2)
    return asdict(profiled(lambda: engine.train(1)))


def _our_recipe(places: Places, folder: Path, shape: str) -> str:
    return json.dumps(_recipe(str(places.model), {"train": f"{folder / INFO_FILE}:{shape}"}))


def _ours(places: Places, folder: Path, shape: str, tokens: int) -> Run:
    file = folder / f"{shape}.recipe.yaml"
    file.write_text(_our_recipe(places, folder, shape), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "fedloom.cli", "train", str(file), "--out", out, "--quiet"]
        peak = _run(command, {}, folder / "ours.log")
        seconds = json.loads((Path(out) / "summary.json").read_text(encoding="utf-8"))["seconds"]["training"]
    return Run(EPOCHS * tokens / seconds, peak, os.getloadavg()[0])


def _theirs(python: Path, places: Places, folder: Path, shape: str, tokens: int) -> Run:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        settings = {
            "model_name_or_path": str(places.model),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset": shape,
            "dataset_dir": str(folder),
            "cutoff_len": MAX_LENGTH,
            "num_train_epochs": EPOCHS,
            "output_dir": f"{out}/run",
            "report_to": "none",
            "include_effective_tokens_per_second": True,
        }
        file = folder / f"{shape}.llamafactory.yaml"
        file.write_text(json.dumps(settings), encoding="utf-8")
        command = [str(python.with_name("llamafactory-cli")), "train", str(file)]
        peak = _run(command, {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{out}/cache"}, folder / "theirs.log")
        results = json.loads((Path(out) / "run" / "train_results.json").read_text(encoding="utf-8"))
    speed, seconds = results["effective_tokens_per_sec"], results["train_runtime"]
    if round(speed * seconds) != EPOCHS * tokens:
        raise RunError(f"the sides do not see the same: {EPOCHS * tokens} and {speed * seconds:.0f} tokens")
    return Run(speed, peak, os.getloadavg()[0])


def _run(command: Sequence[str], further: dict[str, str], log: Path) -> int:
    """Run a command as from a person's shell; returns the most memory that its process held."""
    # What our own libraries were told in this process is no default of the other side's.
    ours = {*SETTINGS, "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    peak = 0
    with (
        log.open("w", encoding="utf-8") as stream,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": str(THREADS), **further},
            stdout=stream,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
    if process.returncode != 0:
        raise RunError(f"{Path(command[0]).name} failed: {log.read_text(encoding='utf-8')[-2000:]}")
    return peak


def _installed() -> Path:
    """The Python of LLaMA-Factory's environment, which is made where there is none, with the PyTorch that ours has."""
    folder = (OUTPUT / "llamafactory").absolute()
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "install", "llamafactory", f"torch=={version('torch').partition('+')[0]}"], {}, folder / "install.log")
    if "+cpu" in version("torch"):
        # From the package index both come for CUDA, and are not loaded beside a PyTorch for the CPU. Text needs
        # neither: without torchvision transformers leaves images out, and of torchaudio only the Python is imported.
        _run([*pip, "uninstall", "--yes", "torchvision"], {}, folder / "install.log")
        for library in folder.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
            library.unlink()
    done.touch()
    return python
