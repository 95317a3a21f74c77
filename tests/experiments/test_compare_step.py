"""A step that compares: what it reads, its figures, gates on them, and a later step that trains on its pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.foundation.errors import InputError
from experiments.carrying_out import carry_out
from experiments.digests import Digester
from experiments.pipeline import load_pipeline
from experiments.running import OnProgress
from tests import tiny


def pipeline_file(folder: Path, model: Path, **steps: Any) -> Path:
    """A pipeline of two runs that learn different answers, then these steps."""
    for number, name in enumerate(("alpha", "beta")):
        tiny.write_jsonl(folder / f"{name}.jsonl", tiny.questions(3 * number, 20))
    tiny.write_jsonl(folder / "prompts.jsonl", tiny.questions(7, 6))
    (folder / "judge.py").write_text("def longer(prompt, first, second):\n    return len(first) - len(second)\n")

    def sft(name: str) -> dict[str, Any]:
        return {
            "recipe": {
                "model": {"name_or_path": str(model)},
                "stage": "sft",
                "data": {
                    "train": str(folder / f"{name}.jsonl"),
                    "columns": {"prompt": "question", "completion": "answer"},
                },
                "training": {"learning_rate": 1e-2, "max_length": 64, "max_steps": 25},
            }
        }

    document = {"output": str(folder / "runs"), "steps": {"alpha": sft("alpha"), "beta": sft("beta"), **steps}}
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


COMPARE = {"compare": ["${alpha}", "${beta}"], "on": "prompts.jsonl", "judge": "judge.py:longer", "max_tokens": 12}


def watch(planned: Any) -> Any:
    from contextlib import nullcontext

    silent: OnProgress = lambda *_: None  # noqa: E731
    return nullcontext(silent)


@pytest.mark.slow
def test_models_are_compared_once_and_a_stage_trains_on_the_pairs(tiny_model: Path, tmp_path: Path):
    dpo = {
        "recipe": {
            "model": {"name_or_path": str(tiny_model), "adapters": ["${alpha}"]},
            "stage": "dpo",
            "data": {"train": "${compared}/preferences.jsonl"},
            "training": {"max_length": 96, "max_steps": 1},
        }
    }
    gates = {"win_rate": ">= 0", "models.beta.win_rate": "<= 1", "p": "<= 1"}
    file = pipeline_file(
        tmp_path,
        tiny_model,
        compared={**COMPARE, "gates": gates},
        dpo=dpo,
    )
    carried = carry_out(load_pipeline(file), watch)
    assert carried.ended_by is None
    assert [one.status for one in carried.outcomes] == ["done"] * 4
    compared = carried.outcomes[2]
    assert [gate.passed for gate in compared.gates] == [True] * 3
    shares = {gate.figure: gate.value for gate in compared.gates}
    assert shares["win_rate"] == pytest.approx(1 - shares["models.beta.win_rate"])

    again = carry_out(load_pipeline(file), watch)
    assert [one.status for one in again.outcomes] == ["skipped"] * 4
    judge = tmp_path / "judge.py"
    judge.write_text(judge.read_text().replace("len(first) - len(second)", "len(second) - len(first)"))
    after = carry_out(load_pipeline(file), watch)
    assert [one.status for one in after.outcomes[:3]] == ["skipped", "skipped", "done"]
    turned = {gate.figure: gate.value for gate in after.outcomes[2].gates}
    assert turned["win_rate"] == pytest.approx(1 - shares["win_rate"])


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({**COMPARE, "compare": ["${alpha}"]}, "steps.judged.compare: name two models at least"),
        ({**COMPARE, "compare": ["${alpha}", "${alpha}"]}, "is named twice"),
        ({**COMPARE, "judge": "people"}, "steps.judged.judge: people would keep the pipeline waiting"),
        ({"compare": ["${alpha}", "${beta}"], "on": "prompts.jsonl"}, "steps.judged.judge: name reward:RUN"),
        ({"compare": ["${alpha}", "${beta}"], "judge": "reward:x"}, "steps.judged.on: name a file"),
        ({**COMPARE, "on": "no.jsonl"}, "steps.judged.on: no.jsonl: no such file"),
        ({**COMPARE, "max_tokens": 0}, "steps.judged.max_tokens: give a whole number from 1 up"),
        ({**COMPARE, "temperature": "warm"}, "steps.judged.temperature: give a number"),
        ({**COMPARE, "temprature": 1}, "unknown key; did you mean 'temperature'"),
        ({**COMPARE, "gates": {"win_rat": "> 0"}}, "did you mean 'win_rate'"),
        ({**COMPARE, "gates": {"models.gamma.rating": "> 0"}}, "models.gamma.rating"),
    ],
)
def test_what_is_wrong_in_a_step_is_told_before_anything_runs(tiny_model: Path, tmp_path: Path, step, said):
    with pytest.raises(InputError, match=said):
        load_pipeline(pipeline_file(tmp_path, tiny_model, judged=step))


@pytest.mark.parametrize("on", ["prompts.jsonl", "prom*.jsonl", "task.yaml"])
def test_prompts_that_were_added_count_however_they_are_named(tiny_model: Path, tmp_path: Path, on: str):
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({"data": "prompts.jsonl", "prompt": "question"}))
    models = [str(tiny_model), "no/such-model"]
    path = pipeline_file(tmp_path, tiny_model, judged={**COMPARE, "compare": models, "on": on})
    before = digest(path)
    assert digest(path) == before
    tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.questions(7, 7))
    assert digest(path) != before


def test_a_tasks_words_and_a_modules_judge_count(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = {"data": "prompts.jsonl", "prompt": "question"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.syspath_prepend(str(tmp_path))
    step = {**COMPARE, "compare": [str(tiny_model), "no/such-model"], "on": "task.yaml", "judge": "judge:longer"}
    path = pipeline_file(tmp_path, tiny_model, judged=step)
    before = digest(path)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({**task, "max_tokens": 3}))
    after = digest(path)
    assert after != before
    judge = tmp_path / "judge.py"
    judge.write_text(judge.read_text().replace("len(first) - len(second)", "len(second) - len(first)"))
    assert digest(path) != after


def digest(path: Path) -> str:
    return load_pipeline(path).steps[-1].step.digest(Digester(path.parent.parent / "digests.json"))
