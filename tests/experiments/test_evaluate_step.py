"""A step that evaluates: what it reads, which figures there will be, where its files lie, and gates of its own file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.digests import Digester
from experiments.pipeline import load_pipeline
from tests import tiny

TASK = {"data": "asked.jsonl", "prompt": "question", "answer": "answer", "metrics": ["exact_match"], "max_tokens": 2}
FUNCTION = "def short(answers, **columns):\n    return [-len(one) for one in answers]\n"


@pytest.fixture
def write(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A pipeline of one step, `asked`, which evaluates an untrained model on questions; its files lie beside it."""
    tiny.write_jsonl(tmp_path / "asked.jsonl", tiny.questions(5, 6))
    (tmp_path / "own.py").write_text(FUNCTION)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))

    def write(**step: Any) -> Path:
        asked = {"evaluate": str(tiny_model), "on": str(tmp_path / "task.yaml"), **step}
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / "runs"), "steps": {"asked": asked}}))
        return path

    return write


def digest(path: Path) -> str:
    return load_pipeline(path).steps[0].step.digest(Digester(path.parent / "digests.json"))


@pytest.mark.parametrize(
    "changed", [{"max_tokens": 5}, {"stop": ["."]}, {"temperature": 0.5}, {"chat": False}, {"system": "Be brief."}]
)
def test_every_key_of_a_task_counts(write: Callable[..., Path], tmp_path: Path, changed: dict[str, Any]):
    path = write()
    before = digest(path)
    assert digest(path) == before
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | changed))
    assert digest(path) != before


def test_the_content_of_a_tasks_own_function_counts(write: Callable[..., Path], tmp_path: Path):
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK | {"metrics": ["own.py:short"]}))
    path = write()
    before = digest(path)
    (tmp_path / "own.py").write_text(FUNCTION.replace("-len", "len"))
    assert digest(path) != before


def test_the_content_of_a_modules_function_counts(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "of_a_module.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(metrics=["of_a_module:short"])
    before = digest(path)
    (tmp_path / "of_a_module.py").write_text(FUNCTION.replace("-len", "len"))
    assert digest(path) != before
