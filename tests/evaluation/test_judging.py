"""Judges: a reward model's scores, functions of one's own, and a local model's verdicts, of which some are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.models.results import load_reward_model
from core_training.stages.chat import answer_tokens
from evaluation.answers.judging import ATTEMPTS, RewardModel, RubricJudge, load_own, own_values, verdict_in
from evaluation.answers.subjects import Subject, load_subject
from evaluation.items import Item, Task, Written
from evaluation.running import Settings, evaluate
from evaluation.tasks.loading import Wanted, load_task
from tests import tiny


@pytest.fixture(scope="module")
def reward_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train
    from core_training.recipe.reading import parse_recipe
    from core_training.runs.run_folder import RunFolder

    folder = tmp_path_factory.mktemp("reward")
    pairs = [{"prompt": q["question"], "chosen": q["answer"], "rejected": "No."} for q in tiny.questions(0, 12)]
    data = tiny.write_jsonl(folder / "pairs.jsonl", pairs)
    recipe = parse_recipe(
        f"model: {{name_or_path: '{tiny_model}'}}\nstage: reward\ndata: {{train: '{data}'}}\n"
        "training: {learning_rate: 1e-2, max_steps: 3, max_length: 64, per_device_train_batch_size: 4}\n"
    )
    run = RunFolder(folder / "run")
    with opened_engine(recipe) as engine:
        run.prepare(recipe, resume=False)
        train(recipe, engine, run)
    return run.path


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Subject:
    return load_subject(str(tiny_model))


def asked(name: str, text: str, **more) -> Item:
    record = Record({"id": name, "weight": 3}, Path("r.jsonl"), 1)
    return Item(name, record, "r", prompt=[{"role": "user", "content": text}], plain=text, references=("x",), **more)


def test_a_reward_is_the_score_of_the_last_token_of_prompt_and_answer(reward_run, subject):
    items = {str(n): asked(str(n), "Case 1: " + "fever of the heart? " * (1 + n)) for n in range(4)}
    written = [Written(name, 0, "See the heart ward." * (3 - int(name)), 5, True) for name in items]
    judge = RewardModel(reward_run, subject)
    found = {one.id: value for batch in judge.values(Task("t", [], ()), items, written) for one, value in batch}
    model = load_reward_model(reward_run, subject.base.vocabulary_digest)
    for one in written:
        turns = [{"role": "assistant", "content": one.text}]
        ids = answer_tokens(items[one.id].prompt, turns, subject.base, items[one.id].record).input_ids
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor(ids)[None]).last_hidden_state
            expected = float(model.score(hidden)[0, -1, 0])
        assert found[one.id] == pytest.approx(expected, abs=1e-5)


def test_an_answer_that_was_cut_off_is_judged_without_an_end(reward_run, subject):
    items, judge = {"a": asked("a", "Fever?")}, RewardModel(reward_run, subject)
    whole, cut = (judge._example(Task("t", [], ()), items["a"], Written("a", 0, "Hm", 1, e)) for e in (True, False))
    assert whole.sequences[0].input_ids.tolist()[:-1] == cut.sequences[0].input_ids.tolist()


def test_a_reward_model_is_a_run_of_stage_reward(run, subject):
    with pytest.raises(InputError, match=r"--reward: .* is of stage sft; name a run of stage reward"):
        RewardModel(run, subject)


def test_a_reward_model_is_none_that_answers(reward_run):
    with pytest.raises(InputError, match="it scores answers and gives none; name it with --reward"):
        load_subject(str(reward_run))


def test_rewards_stand_among_the_figures_and_are_asked_for_once(reward_run, run, tmp_path):
    file = tiny.write_jsonl(tmp_path / "q.jsonl", tiny.questions(0, 5))
    task = load_task(str(file), Wanted(("ended",), reward=True))
    settings = Settings(reward=reward_run, overlap=False)
    first, second = (evaluate([str(run)], [task], settings, tmp_path / "to").results[0] for _ in range(2))
    assert first.document["metrics"]["reward"]["n"] == 5
    assert first.document == second.document
    rows = [json.loads(line) for line in (tmp_path / "to" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 10


def test_a_function_of_ones_own_gets_prompts_answers_and_columns(tmp_path, monkeypatch):
    file = tmp_path / "own_figures.py"
    file.write_text(
        "def weighed(prompts, completions, weight, expected):\n"
        "    return [len(c) * w for c, w in zip(completions, weight)]\n"
    )
    items = {"a": asked("a", "Hm?")}
    written = [Written("a", n, "x" * n, n, True) for n in range(3)]
    assert own_values(load_own(f"{file}:weighed"), items, written) == [0.0, 3.0, 6.0]
    monkeypatch.syspath_prepend(tmp_path)
    assert own_values(load_own("own_figures:weighed"), items, written) == [0.0, 3.0, 6.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def f(prompts, completions):\n    return [1 / 0]\n", "ZeroDivisionError in line 2"),
        ("def f(prompts, completions):\n    return []\n", "returned 0 numbers for 1 completions"),
        ("def f(prompts, completions, ward):\n    return [1]\n", "takes 'ward', which is no column of the items"),
        ("g = 1\n", "has no function 'f'"),
    ],
)
def test_what_is_wrong_in_a_function_is_told(tmp_path, body, said):
    (tmp_path / "own.py").write_text(body)
    with pytest.raises(InputError, match=f"metrics: .*{said}"):
        own_values(load_own(f"{tmp_path / 'own.py'}:f"), {"a": asked("a", "Hm?")}, [Written("a", 0, "x", 1, True)])


def test_a_module_that_is_not_there_is_told():
    with pytest.raises(InputError, match="no_such_module cannot be imported"):
        load_own("no_such_module:f")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"criteria_met": true}', True),
        ('Because … ```json\n{"explanation": "x", "criteria_met": false}\n```', False),
        ("Yes, it does.", True),
        ("**no**", False),
        ('{"criteria_met": "maybe"}', None),
        ("Nobody knows", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_what_a_judge_says(text, verdict):
    assert verdict_in(text) is verdict


def healthbench(path: Path) -> Path:
    record = {
        "prompt": [{"role": "user", "content": "Fever?"}],
        "rubrics": [{"criterion": f"Says {n}", "points": n + 1} for n in range(3)],
    }
    path.write_text(json.dumps(record) + "\n")
    return path


def test_a_judge_that_never_gives_a_verdict_is_asked_so_often_and_counted(tiny_model, tmp_path, monkeypatch):
    times = []
    first = RubricJudge._asked
    monkeypatch.setattr(RubricJudge, "_asked", lambda self, qs, n: times.append(len(qs)) or first(self, qs, n))
    task = load_task(str(healthbench(tmp_path / "h.jsonl")))
    settings = Settings(judge=str(tiny_model))
    found = evaluate([str(tiny_model)], [task], settings, tmp_path / "to").results[0].document
    assert times == [3] * ATTEMPTS
    assert found["unjudged"] == {"criteria": 3, "of": 3, "answers": 1}
    assert "rubric" not in found["metrics"]


def test_rubrics_need_a_judge(tiny_model, tmp_path):
    task = load_task(str(healthbench(tmp_path / "h.jsonl")))
    with pytest.raises(InputError, match="name one with --judge"):
        evaluate([str(tiny_model)], [task], Settings(), tmp_path / "to")
