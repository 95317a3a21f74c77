"""What a site says of its own failures to those who give it orders: that it failed, and nothing of its records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from client.site_config import parse_site_config
from client.worker import Worker
from core_training import __version__
from core_training.recipe.schema import Recipe
from strategies.messages import JoinOrder, JoinReply, TrainOrder
from tests import tiny
from tests.site_folder import give_key


def test_a_failing_reward_function_tells_the_server_nothing_of_the_records(
    make_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails only once there are answers, so in training."""
    data = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.questions(0, 12))
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, completions):\n"
        "    if any(completions):\n"
        "        raise KeyError(prompts[0])\n"
        "    return [0.0] * len(prompts)\n"
    )
    config = parse_site_config(
        {
            "name": "heart",
            "server": "localhost:9092",
            "data": {"questions": str(data)},
            "models": {"tiny": str(tiny_model)},
            "reward_functions": {"politeness": f"{tmp_path}/judge.py:judge"},
        },
        "site.yaml",
    )
    recipe = make_recipe(
        stage="grpo",
        model={"name_or_path": "tiny"},
        data={"train": "questions", "columns": {"prompt": "question"}},
        rollout={"reward_function": "politeness", "max_new_tokens": 8},
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
    )
    give_key(tmp_path / "heart")
    service = Worker(tmp_path / "heart", config).service
    order = JoinOrder(run_id="run", version=__version__, recipe=recipe.to_yaml())
    manifest = JoinReply.open(service.handle(order.envelope())).parsed_manifest
    train = TrainOrder(run_id="run", round=1, steps=1, evaluate=False, manifest_digest=manifest.digest)
    refusal = service.handle(train.envelope())
    service.close()
    assert refusal.kind == "refused"
    assert refusal.fields["reason"].startswith("site 'heart' could not work with its model, data or reward function;")
    assert "Case" not in str(refusal.fields)
    assert str(tmp_path) not in str(refusal.fields)
    assert "reward_function" in caplog.text


def test_a_recipe_that_a_site_cannot_carry_out_is_refused_by_its_key_and_nothing_else(
    make_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "patients.jsonl"
    data.write_text('{"question": "Who is Maria?"}\n')
    document = {
        "name": "heart", "server": "localhost:9092", "data": {"questions": str(data)}, "models": {"m": str(tiny_model)},
    }  # fmt: skip
    recipe = make_recipe(
        model={"name_or_path": "m"}, data={"train": "questions"},
        topology={"kind": "federated", "rounds": 1, "local_steps": 1},
    )  # fmt: skip
    give_key(tmp_path / "heart")
    service = Worker(tmp_path / "heart", parse_site_config(document, "site.yaml")).service
    refusal = service.handle(JoinOrder(run_id="run", version=__version__, recipe=recipe.to_yaml()).envelope())
    service.close()
    told = (
        "site 'heart' could not work with its model, data or reward function (data.train); "
        "its own logs/worker.log says why"
    )
    assert (refusal.kind, refusal.fields["reason"], refusal.fields["fatal"]) == ("refused", told, True)
