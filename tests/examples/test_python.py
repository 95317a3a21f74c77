"""The short programs of `examples/python`, and the code of docs/python.md, run as a person would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    tiny.make_model(folder / "base-model")
    for seed, name in enumerate(("notes", "new", "north", "south", "west")):
        tiny.write_jsonl(folder / f"{name}.jsonl", tiny.texts(seed, 24))
    tiny.write_jsonl(
        folder / "questions.jsonl",
        [{"prompt": record["question"], "completion": record["answer"]} for record in tiny.questions(1, 24)],
    )
    return folder


def run(place: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("own_reward", ("base-model", "questions.jsonl", "reward"), r"step 2 of 2\nmean reward: 0\.\d+\n"),
        ("own_stage", ("base-model", "questions.jsonl", "stage"), r"held-out loss: \d\.\d+\n"),
        ("own_rule", ("base-model", "rule", "north.jsonl", "south.jsonl", "west.jsonl"),
         r"round 1: \d\.\d+\nround 2: \d\.\d+\nheld-out loss: \d\.\d+\n"),
        ("notebook", ("base-model", "notes.jsonl", "new.jsonl", "book"), r"(?s)rank 2: \[.*on 24 new records"),
    ],
)  # fmt: skip
def test_a_program_does_what_it_says(place: Path, name: str, arguments: tuple[str, ...], said: str) -> None:
    assert len((ROOT / f"examples/python/{name}.py").read_text().splitlines()) <= 52
    assert re.search(said, run(place, "-m", f"examples.python.{name}", *arguments))


def test_the_code_of_the_page_runs(place: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert run(place, "-c", code).splitlines()[-1] == "done"


def test_importing_changes_nothing_in_the_process(place: Path) -> None:
    code = """
import gc, os, signal, sys
before = dict(os.environ), gc.get_freeze_count(), gc.get_threshold(), signal.getsignal(signal.SIGINT)
import fedloom
from fedloom import Recipe, evaluate, load_run, simulate, train
assert before == (dict(os.environ), gc.get_freeze_count(), gc.get_threshold(), signal.getsignal(signal.SIGINT))
assert "torch" not in sys.modules and "flwr" not in sys.modules
handler = signal.getsignal(signal.SIGINT)
recipe = Recipe(
    model={"name_or_path": "base-model"}, stage="pretrain", data={"train": "notes.jsonl"}, training={"max_steps": 1},
    output="quiet",
)
train(recipe, on_step=lambda *_: print(signal.getsignal(signal.SIGINT) == handler, gc.get_freeze_count()))
"""
    assert run(place, "-c", code) == "True 0\n"


def test_a_part_that_comes_too_late_is_refused_with_the_remedy(place: Path) -> None:
    code = """
from fedloom import InputError, Recipe
try:
    import examples.python.own_stage
except InputError as error:
    print(error)
"""
    assert "part 'calm': recipes are in use already; add it before" in run(place, "-c", code)
