"""The measurement of a machine with one GPU, in its tiny shapes: that it goes to its end whatever fails on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.engine.sides import Ours
from benchmarks.gpu import __main__ as measuring
from benchmarks.gpu import matrix, table
from benchmarks.gpu.device import describe, peak_flops
from benchmarks.gpu.flops import flops_per_token
from benchmarks.gpu.isolated import outcome_of
from benchmarks.gpu.parts import Part, plan
from benchmarks.gpu.shapes import SHAPES, make_model
from benchmarks.gpu.throughput import sections
from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.parts.tuning_modes.lora import Lora

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny model in it."""
    made = str(tmp_path_factory.mktemp("gpu"))
    make_model("tiny", made)
    return made


@pytest.mark.slow
def test_a_part_is_measured_from_the_command_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert measuring.main(["--tiny", "--only", "tiny sft qlora"]) == 0
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["name"] for part in report["parts"]] == ["model tiny", "tiny sft qlora"]
    figures = report["parts"][1]["result"]
    assert figures["tokens_per_second"] > 0
    assert figures["peak_bytes"] > 0
    assert report["machine"]["versions"]["torch"]
    assert not (tmp_path / "runs" / "bench" / "gpu" / "models").exists()  # 16 GB of a real measurement


def test_the_script_runs_with_a_given_interpreter_from_anywhere(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    shown = subprocess.run([script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "--tiny" in shown.stdout


# The matrix


def test_cells_are_runs_to_the_end_and_back_to_a_checkpoint(folder: str) -> None:
    found = matrix.measure("tiny", folder, seconds=60, count=4)
    assert (found["ran"], found["of"]) == (4, 4), found
    assert {cell["tuning"] for cell in found["cells"]} == set(TUNING_MODES)
    assert [cell["held_in"] for cell in found["cells"]].count("4-bit") == 1


def test_a_cell_that_fails_or_comes_too_late_is_a_line(tmp_path: Path, folder: str) -> None:
    failed = matrix.measure("tiny", str(tmp_path), seconds=60, count=2)
    assert all("InputError: model.name_or_path" in cell["failed"] for cell in failed["cells"])
    late = matrix.measure("tiny", folder, seconds=-1, count=2)
    assert [cell["skipped"] for cell in late["cells"]] == ["the matrix had -1 s"] * 2


def test_the_first_ten_cells_have_every_stage_and_every_mode() -> None:
    cells = list(matrix.cells())
    assert len(set(cells)) == len(cells) == len(STAGES) * len(TUNING_MODES)
    assert {stage for stage, _ in cells[:10]} == set(STAGES)
    assert {mode for _, mode in cells[:10]} == set(TUNING_MODES)


# Parts in processes of their own


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("benchmarks.gpu.shapes:make_model", {"shape": "none", "folder": "x"}, "KeyError: 'none'"),
        ("no_such_library:measure", {}, "ModuleNotFoundError: No module named 'no_such_library'"),
        ("os:abort", {}, "it was ended by SIGABRT"),
    ],
)
def test_a_part_that_fails_says_why(tmp_path: Path, function: str, arguments: dict[str, Any], reason: str) -> None:
    outcome = outcome_of(Part("part", function, arguments), 60, tmp_path / "part.log")
    assert outcome["failed"].startswith(reason)


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    command = "sleep 60 & echo $! > pid; wait"
    part = Part("part", "subprocess:run", {"args": ["sh", "-c", command], "cwd": str(tmp_path)})
    began = time.monotonic()
    assert outcome_of(part, 15, tmp_path / "part.log")["failed"] == "it took longer than 15 s"
    assert time.monotonic() - began < 40
    started = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _runs(started):  # a busy machine takes a moment to end it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def test_what_no_longer_fits_or_lacks_its_model_is_skipped_and_says_so(tmp_path: Path) -> None:
    part = Part("part", "never:called", least=20, needs="model")
    there = {"model": {"result": {}}}
    assert measuring._outcome(part, 100, {"model": {"failed": "no room"}}, tmp_path) == {
        "skipped": "model is not there"
    }
    assert measuring._outcome(part, 7, there, tmp_path) == {"skipped": "7 s are left, and it takes 20 s or more"}
    lacking = Part("part", "never:called", not_measured="no GPU")
    assert measuring._outcome(lacking, 100, there, tmp_path) == {"not_measured": "no GPU"}


@pytest.mark.parametrize("tiny", [True, False])
def test_a_plan_makes_each_model_before_it_is_needed_and_names_no_part_twice(tiny: bool) -> None:
    names: list[str] = []
    for part in plan(describe(), "folder", tiny=tiny):
        assert part.name not in names
        assert part.needs is None or part.needs in names
        names.append(part.name)
    for wanted in ("sft lora", "sft TRL defaults", "sft TRL liger", "dpo lora", "grpo lora", "sft qlora", "packing"):
        assert any(wanted in name for name in names)


# The arithmetic


@pytest.mark.parametrize(
    ("shape", "published", "embeddings", "norms"),
    [("1b", 1_235_814_400, 0, 33 * 2048), ("7b", 6_738_415_616, 32_000 * 4096, 65 * 4096)],
)
def test_shapes_have_as_many_parameters_as_the_published_models(
    shape: str, published: int, embeddings: int, norms: int
) -> None:
    assert SHAPES[shape].multiplied_parameters + embeddings + norms == published


def test_parameters_are_those_that_the_engine_multiplies_and_trains(folder: str) -> None:
    ours = Ours(sections("tiny", folder, "sft", "lora"), 1)
    shape = SHAPES["tiny"]
    weights = [p.numel() for n, p in ours.engine._base.model.named_parameters() if "lora" not in n and p.ndim > 1]
    assert shape.multiplied_parameters == sum(weights)  # embeddings and output layer are one
    assert shape.adapter_parameters(Lora().r) == ours.engine.manifest.size


def test_a_token_costs_what_the_formula_says() -> None:
    shape = SHAPES["tiny"]
    weights, adapters = shape.multiplied_parameters, shape.adapter_parameters(8)
    assert flops_per_token("sft", "full", shape, 8) == 6 * weights
    assert flops_per_token("sft", "qlora", shape, 8) == 4 * weights + 6 * adapters
    assert flops_per_token("dpo", "lora", shape, 8) == 6 * weights + 6 * adapters


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("CPU", None),
    ],
)
def test_the_peak_is_that_of_the_device(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_the_table_has_a_row_for_whatever_became_of_a_part() -> None:
    figures = {"tokens_per_second": 1234.5, "mfu": 0.42, "peak_bytes": 2**30}
    layouts = {"padded": {**figures, "mfu": None}, "packed": {"refused": "training.packing: no"}}
    cell = {"stage": "dpo", "tuning": "lora", "failed": "RunError: no"}
    report = {
        "parts": [
            {"name": "model 1b", "result": {"parameters": 1}},
            {"name": "1b sft lora", "result": figures},
            {"name": "1b packing flash", "result": layouts},
            {"name": "matrix", "result": {"cells": [cell], "ran": 0, "of": 1}},
            {"name": "7b sft lora", "failed": "out of memory"},
        ]
    }
    assert list(table.lines(report))[2:] == [
        "| 1b sft lora | 1,234 | 42% | 1.00 GiB |  |",
        "| 1b packing flash, padded | 1,234 |  | 1.00 GiB |  |",
        "| 1b packing flash, packed |  |  |  | refused: training.packing: no |",
        "| matrix |  |  |  | 0 of 1 cells ran; dpo × lora: RunError: no |",
        "| 7b sft lora |  |  |  | failed: out of memory |",
    ]
