"""docs/comparing.md: its function is a judge, its pipeline is one, and its figures are those that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from core_training.data.records import Record
from evaluation import pairs
from evaluation.items import Item
from evaluation.pairs.pair_judges import FunctionJudge, takes_pairs
from evaluation.pairs.pairwise import Shown, Winner
from experiments.pipeline import load_pipeline
from tests.test_docs import ROOT, fenced

PAGE = ROOT / "docs" / "comparing.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "judge.py").write_text(fenced(PAGE, "python")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_function_shown_judges_by_the_column_that_it_names(folder: Path) -> None:
    assert takes_pairs("judge.py:nearer")
    record = Record({"question": "Where?", "answer": "See the heart ward"}, Path("q.jsonl"), 1)
    item = Item("1", record, "", prompt=[{"role": "user", "content": "Where?"}])
    ((_, look, _),) = next(
        FunctionJudge("judge.py:nearer").looks([Shown(item, "A", "B", ("the lung ward", "the heart ward"))])
    )
    assert (look.winner, look.margin) == (Winner.SECOND, 1.0)


def test_the_pipeline_shown_is_one(folder: Path) -> None:
    recipe = {
        "model": {"name_or_path": "base"},
        "stage": "sft",
        "data": {"train": "questions.jsonl", "columns": {"prompt": "question", "completion": "answer"}},
    }
    for name in ("sft", "ppo"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    shown = next(body for body in fenced(PAGE, "yaml") if "steps" in yaml.safe_load(body))
    (folder / "chain.yaml").write_text(shown)
    (folder / "questions.jsonl").write_text('{"prompt": "Why?"}\n')
    pipeline = load_pipeline(folder / "chain.yaml")
    assert [gate.figure for gate in pipeline.steps[2].gates] == ["win_rate", "p"]


def test_every_figure_in_the_table_is_in_the_results() -> None:
    source = "".join((Path(pairs.__file__).parent / name).read_text() for name in ("contest.py", "pairwise.py"))
    table = PAGE.read_text().partition("| figure | is |")[2].partition("##")[0]
    names = [name for cell in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 12
    assert [name for name in names if f'"{name}"' not in source] == []
