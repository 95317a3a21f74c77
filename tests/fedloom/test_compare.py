"""`fedloom compare`: as a person types it; what is kept, what a kill leaves, and stages that train on the verdicts."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from evaluation.figures.words import token_f1
from tests import tiny
from tests.fedloom.conftest import Command

TOKENS = ("--max-tokens", 10)
JUDGES = """
def by_letters(prompt, first, second):
    return sum(map(ord, first)) - sum(map(ord, second))

def first(prompt, first, second):
    return "first"

def score(prompts, completions):
    return [float(sum(map(ord, text))) for text in completions]

def wrong(prompts, completions):
    return [1.0]
"""


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that have learnt different answers."""
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train
    from core_training.recipe.reading import parse_recipe
    from core_training.runs.run_folder import RunFolder

    place, made = tmp_path_factory.mktemp("learnt"), []
    for number, name in enumerate(("alpha", "beta")):
        document = {
            "model": {"name_or_path": str(tiny_model)},
            "stage": "sft",
            "tuning": {"mode": "lora"},
            "data": {
                "train": str(tiny.write_jsonl(place / f"{name}.jsonl", tiny.questions(3 * number, 20))),
                "columns": {"prompt": "question", "completion": "answer"},
            },
            "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_length": 64, "max_steps": 30},
        }
        folder = RunFolder(place / name)
        recipe = parse_recipe(yaml.safe_dump(document))
        with opened_engine(recipe) as engine:
            folder.prepare(recipe, resume=False)
            train(recipe, engine, folder)
        made.append(folder.path)
    return made


@pytest.fixture(scope="module")
def run(runs: list[Path]) -> Path:
    return runs[0]


@pytest.fixture(scope="module")
def other(runs: list[Path]) -> Path:
    return runs[1]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": one["question"]} for one in tiny.questions(7, 8)])


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    path = tmp_path / "judges.py"
    path.write_text(JUDGES)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_function_judges_two_models_and_a_stage_trains_on_the_verdicts(
    fedloom: Command, run: Path, other: Path, tiny_model: Path, prompts: Path, judges: Path, tmp_path: Path
) -> None:
    to = tmp_path / "compared"
    command = ("compare", run, other, "--on", prompts, "--judge", f"{judges}:by_letters", *TOKENS, "--to", to)
    outcome = fedloom(*command, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [one["model"] for one in found["models"]] == [str(run), str(other)]
    answers = {(row["model"], row["id"]): row["answer"] for row in lines(to / "answers.jsonl")}
    expected = {"wins": 0, "losses": 0, "ties": 0}
    for (model, name), text in answers.items():
        if model == str(run):
            ours, theirs = (sum(map(ord, one)) for one in (text, answers[str(other), name]))
            expected["wins" if ours > theirs else "losses" if ours < theirs else "ties"] += 1
    first, second = found["models"]
    assert {key: first[key] for key in expected} == expected
    assert (second["wins"], second["losses"]) == (first["losses"], first["wins"])
    assert found["position_bias"] == 0.0
    assert found["judge"] == f"{judges}:by_letters"
    assert {"rating", "low", "high"} <= first.keys()
    assert json.loads((to / "results.json").read_text()) == found
    assert "http://" not in (to / "report.html").read_text().replace("http://www.w3.org", "")

    pairs = lines(to / "preferences.jsonl")
    assert len(pairs) == found["preferences"]["pairs"] == expected["wins"] + expected["losses"] > 0
    assert pairs[0].keys() == {"prompt", "chosen", "rejected", "margin"}
    for stage in ("dpo", "reward"):
        recipe = {
            "model": {"name_or_path": str(tiny_model)},
            "stage": stage,
            "data": {"train": str(to / "preferences.jsonl")},
            "training": {"max_length": 128, "max_steps": 2, "per_device_train_batch_size": 2},
            "output": str(tmp_path / stage),
        }
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
        trained = fedloom("train", tmp_path / f"{stage}.yaml", "--json")
        assert trained.code == 0, trained.err
        (site,) = json.loads(trained.out)["sites"].values()
        assert site["train_examples"] + site["eval_examples"] == len(pairs)

    again = fedloom(*command, "--json")
    assert json.loads(again.out) == found
    assert "answers: item" not in again.err  # neither written nor judged again
    assert "verdicts of" not in again.err


def test_unless_it_is_said_the_answer_nearer_to_the_expected_one_wins(
    fedloom: Command, run: Path, other: Path, prompts: Path, tmp_path: Path
) -> None:
    asked = [{"prompt": "what is alpha", "completion": "alpha is an ailment"}, {"prompt": "beta", "completion": "beta"}]
    records = tiny.write_jsonl(tmp_path / "expected.jsonl", asked)
    to = tmp_path / "compared"
    outcome = fedloom("compare", run, other, "--on", records, *TOKENS, "--to", to, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["judge"] == "expected"
    answers: dict[str, dict[str, tuple[str, str]]] = {}
    for line in lines(to / "answers.jsonl"):
        answers.setdefault(line["id"], {})[line["model"]] = (line["answer"], line["expected"])
    wins = dict.fromkeys((str(run), str(other)), 0)
    for by_model in answers.values():
        near = {model: token_f1(*said) for model, said in by_model.items()}
        if len(set(near.values())) > 1:
            wins[max(near, key=near.__getitem__)] += 1
    assert {one["model"]: one["wins"] for one in found["models"]} == wins
    alone = fedloom("compare", run, other, "--on", prompts, *TOKENS, "--to", tmp_path / "without")
    assert alone.code == 2
    assert "come without expected answers to judge by; name a judge with --judge" in alone.err


def test_a_function_that_scores_judges_as_one_that_looks_at_pairs(
    fedloom: Command, run: Path, other: Path, prompts: Path, judges: Path, tmp_path: Path
) -> None:
    found = {}
    for name in ("by_letters", "score", "first"):
        to = tmp_path / "compared"  # the answers are written once
        outcome = fedloom(
            "compare", run, other, "--on", prompts, "--judge", f"{judges}:{name}", *TOKENS, "--to", to, "--json"
        )
        assert outcome.code == 0, outcome.err
        found[name] = json.loads(outcome.out)
    assert found["score"]["win_matrix"] == found["by_letters"]["win_matrix"]
    differing = len(lines(prompts)) - found["first"]["identical"]
    assert (found["first"]["position_bias"], found["first"]["tie_share"]) == (1.0, 1.0)
    assert found["first"]["looks"] == 2 * differing


def test_a_local_model_that_never_gives_a_verdict_is_asked_twice_and_what_it_left_is_counted(
    fedloom: Command, run: Path, tiny_model: Path, prompts: Path, tmp_path: Path
) -> None:
    to = tmp_path / "compared"
    outcome = fedloom(
        "compare", run, tiny_model, "--on", prompts, "--judge", f"model:{tiny_model}", *TOKENS, "--to", to, "--json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    asked = len(lines(prompts)) - found["identical"]
    assert found["unjudged"] == asked > 0
    assert f"{asked} pairs were not judged" in outcome.err
    assert [one["rating"] for one in found["models"]] == ([None, None] if not found["identical"] else [1000.0, 1000.0])
    assert all("said" in row and row["verdict"] is None for row in lines(to / "verdicts.jsonl"))


@pytest.mark.slow
def test_a_reward_run_judges_three_models_by_its_scores(
    fedloom: Command,
    run: Path,
    other: Path,
    tiny_model: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    records = [
        {"prompt": one["question"], "chosen": one["answer"], "rejected": "No idea."} for one in tiny.questions(1, 16)
    ]
    recipe = {
        "model": {"name_or_path": str(tiny_model)},
        "stage": "reward",
        "data": {"train": str(tiny.write_jsonl(tmp_path / "pairs.jsonl", records))},
        "training": {"max_length": 64, "max_steps": 4, "learning_rate": 1e-3},
        "output": str(tmp_path / "reward"),
    }
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(recipe))
    assert fedloom("train", tmp_path / "reward.yaml", "--quiet").code == 0
    models = [run, tiny_model, other]
    to = tmp_path / "compared"
    outcome = fedloom(
        "compare", *models, "--on", prompts, "--judge", f"reward:{tmp_path / 'reward'}", *TOKENS, "--to", to, "--json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert len(found["models"]) == len(found["pairs"]) == 3
    scores = {(row["model"], row["id"]): row["value"] for row in lines(to / "answers.jsonl") if row["part"] == "value"}
    for one in found["pairs"]:
        ours, theirs = ([scores[one[side], name] for name in _ids(scores)] for side in ("model", "against"))
        assert one["wins"] == sum(a > b for a, b in zip(ours, theirs, strict=True))
    margins = {pair["margin"] for pair in lines(to / "preferences.jsonl")}
    gaps = {abs(a - b) for (_, i), a in scores.items() for (_, j), b in scores.items() if i == j}
    assert margins
    assert all(any(margin == pytest.approx(gap) for gap in gaps) for margin in margins)


def _ids(scores: dict[tuple[str, str], float]) -> list[str]:
    return sorted({name for _, name in scores})


@pytest.mark.parametrize(
    ("models", "more", "said"),
    [
        (["BASE"], [], "a comparison is of two models at least"),
        (["BASE", "BASE"], [], "is named twice"),
        (["BASE", "BASE/."], [], "is named twice (as "),
        (["BASE", "RUN"], ["--judge", "somebody"], "names no judge; give one of expected, reward:RUN"),
        (["BASE", "RUN"], ["--judge", "nowhere.py:judge"], "--judge: nowhere.py: no such file"),
        (["BASE", "RUN"], ["--judge", "reward:RUN"], "--judge: "),
        (["BASE", "RUN"], ["--judge", "model:nowhere"], "nowhere: no run folder"),
        (["BASE", "RUN"], ["--judge", "JUDGES:wrong"], "--judge: JUDGES:wrong returned 1 numbers for 8"),
        (["BASE", "RUN"], ["--judge", "people", "--annotators", ","], "--annotators: give a name"),
    ],
)
def test_what_cannot_be_compared_is_told(
    fedloom: Command,
    run: Path,
    tiny_model: Path,
    prompts: Path,
    judges: Path,
    tmp_path: Path,
    models: list[str],
    more: list[str],
    said: str,
) -> None:
    def real(text: str) -> str:
        return text.replace("BASE", str(tiny_model)).replace("RUN", str(run)).replace("JUDGES", str(judges))

    judge = [] if "--judge" in more else ["--judge", f"{judges}:first"]
    said = said if "give one of" in said else real(said)
    outcome = fedloom(
        "compare", *map(real, [*models, *more, *judge]), "--on", prompts, *TOKENS, "--to", tmp_path / "to"
    )
    assert outcome.code == 2
    assert said in outcome.err


@pytest.mark.parametrize(
    ("record", "said"),
    [({"prompt": "  "}, "empty"), ({"text": "Words."}, "plain text"), ({"answer": "No question."}, "no kind of task")],
)
def test_prompts_that_are_none_are_told_with_their_place(
    fedloom: Command, run: Path, tiny_model: Path, judges: Path, tmp_path: Path, record: dict[str, str], said: str
) -> None:
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", [record])
    outcome = fedloom(
        "compare", run, tiny_model, "--on", file, "--judge", f"{judges}:first", "--to", tmp_path / "to"
    )  # fmt: skip
    assert outcome.code == 2
    assert said in outcome.err
    assert f"{file}, line 1" in outcome.err or "prompts" in outcome.err


def test_an_empty_file_of_prompts_is_told(fedloom: Command, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    outcome = fedloom("compare", run, tiny_model, "--on", tmp_path / "prompts.jsonl", "--judge", "people")
    assert outcome.code == 2
    assert "holds no items" in outcome.err


@contextmanager
def people_at_work(
    arguments: list[str], names: str, environment: dict[str, str], folder: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The command in a process of its own, and each person's link."""
    command = [sys.executable, "-m", "fedloom.cli", *arguments, "--judge", "people", "--annotators", names, "--json"]
    log = folder / "words.txt"
    with log.open("w") as words, subprocess.Popen(
        command, env=environment, stderr=words, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        try:
            yield process, _links(log, process, names.count(",") + 1)
        finally:
            if process.poll() is None:
                process.kill()


def _links(log: Path, process: subprocess.Popen[str], count: int) -> dict[str, str]:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        found = dict(re.findall(r"^(\w+): (http://127\.0\.0\.1:\d+/enter/\S+)$", log.read_text(), re.MULTILINE))
        if len(found) == count:
            return found
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def judged(link: str, most: int) -> int:
    """A person who takes the answer that is later by the alphabet, at most so many times."""
    with httpx.Client(base_url=link.partition("/enter")[0], follow_redirects=True, trust_env=False) as client:
        client.get(link)
        for number in range(most):
            look = client.get("/look").json()["look"]
            if look is None:
                return number
            choice = 1 if look["first"] > look["second"] else 2
            client.post("/verdict", json={"look": look["number"], "choice": choice})
    return most


@pytest.mark.slow
def test_people_judge_through_a_kill_and_a_stop_and_no_verdict_is_lost(
    run: Path, other: Path, prompts: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    to = tmp_path / "compared"
    arguments = ["compare", str(run), str(other), "--on", str(prompts), "--max-tokens", "10", "--to", str(to)]
    with people_at_work(arguments, "ann,bob", environment, tmp_path) as (process, links):
        assert judged(links["ann"], 3) == 3
        process.send_signal(signal.SIGKILL)
    verdicts = lines(to / "verdicts.jsonl")
    assert [row["by"] for row in verdicts] == ["ann"] * 3

    with people_at_work(arguments, "ann,bob", environment, tmp_path) as (process, links):
        left = judged(links["ann"], 100)
        assert judged(links["bob"], 2) == 2
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in (tmp_path / "words.txt").read_text()
    so_far = json.loads(out)
    differing = so_far["prompts"] - so_far["identical"]
    assert left == differing - 3
    assert so_far["agreement"]["cohen"][0]["pairs"] == 2

    with people_at_work(arguments, "ann,bob", environment, tmp_path) as (process, links):
        assert judged(links["bob"], 100) == differing - 2
        out, _ = process.communicate(timeout=60)  # it ends by itself
    assert process.returncode == 0
    found = json.loads(out)
    assert lines(to / "verdicts.jsonl")[:3] == verdicts
    assert (found["unjudged"], found["looks"]) == (0, 2 * differing)
    assert found["agreement"]["cohen"][0] == {
        "annotators": ["ann", "bob"],
        "pairs": differing,
        "agreed": 1.0,
        "kappa": found["agreement"]["cohen"][0]["kappa"],
    }
    answers = {(row["model"], row["id"]): row["answer"] for row in lines(to / "answers.jsonl")}
    later = sum(text > answers[str(other), name] for (model, name), text in answers.items() if model == str(run))
    assert found["models"][0]["wins"] == later
