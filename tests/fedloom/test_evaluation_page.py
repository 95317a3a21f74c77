"""docs/evaluation.md shows what `fedloom evaluate` prints, and its files are what the command reads."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evaluation.figures.gates import read_gates
from evaluation.figures.metrics import METRICS
from evaluation.tasks.loading import TaskFile
from tests.fedloom.conftest import Command
from tests.test_docs import ROOT, fenced

PAGE = ROOT / "docs" / "evaluation.md"
COMMAND = "evaluate runs/wards --on wards.yaml --against models/base --gates gates.yaml"


def without_numbers(text: str) -> list[list[str]]:
    """The words of each line; what a figure is in its last digits depends on the machine."""
    return [
        re.sub(r"-?\d+(\.\d+)?(e-\d+)?", "0", line).replace("━", "").replace("─", "").split()
        for line in text.splitlines()
    ]


def test_the_page_shows_what_is_printed(
    fedloom: Command,
    finished_run: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`make docs` writes the block anew: EVALUATION_PAGE=1 runs this test so."""
    monkeypatch.chdir(tmp_path)
    (records,) = fenced(PAGE, "jsonl")
    Path("wards.jsonl").write_text(records)
    task, gates, _ = fenced(PAGE, "yaml")
    Path("wards.yaml").write_text(task)
    Path("gates.yaml").write_text(gates)
    shutil.copytree(finished_run(), "runs/wards")
    shutil.copytree(tiny_model, "models/base")
    shown = fedloom(*COMMAND.split())
    assert shown.code == 0, shown.err
    progress = [line for line in shown.err.splitlines() if ": item " not in line]
    lines = [f"$ fedloom {COMMAND}", *shown.out.splitlines(), *progress]
    printed = "".join(f"{line.rstrip()}\n" for line in lines)
    (block,) = fenced(PAGE, "console")
    if os.environ.get("EVALUATION_PAGE"):
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(f"```console\n{block}```", f"```console\n{printed}```"), encoding="utf-8")
        return
    assert without_numbers(block) == without_numbers(printed), "make docs"


def test_the_gates_shown_are_read(tmp_path: Path) -> None:
    for body in fenced(PAGE, "yaml")[1:]:
        (tmp_path / "gates.yaml").write_text(body)
        assert read_gates(tmp_path / "gates.yaml").gates


def test_every_metric_and_key_of_a_task_is_told() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in text] == []
    shown = {*yaml.safe_load(fenced(PAGE, "yaml")[0]), *re.findall(r"`(\w+)`", text)}
    assert set(TaskFile.model_fields) <= shown
