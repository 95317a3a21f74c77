"""Rounds that each site takes at its own pace: passes over its own records, or time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import DataReport
from core_training.recipe.pace import steps_of_a_round
from core_training.recipe.schema import Recipe
from core_training.runs.events import StepsLogged
from core_training.runs.run_folder import RunFolder, Summary
from core_training.stages.sft import Sft
from simulations import simulate
from strategies.bounds import most_steps
from strategies.messages import Envelope
from tests import tiny
from tests.failing_sites import federate

MakeRecipe = Callable[..., Recipe]
ROUNDS = 4
RATE = 1e-2


@pytest.fixture
def paced(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(files: list[Path] | None = None, training: dict[str, Any] | None = None, **topology: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": ROUNDS, **topology},
            training={
                "max_steps": None, "logging_steps": 1, "lr_scheduler_type": "linear", "learning_rate": RATE,
                **(training or {}),
            },
            simulation={"sites": [str(path) for path in files or site_files]},
        )  # fmt: skip

    return make


def run(recipe: Recipe, folder: Path) -> Summary:
    return simulate(recipe, RunFolder(folder))


def rates(folder: Path) -> list[float]:
    return [event.learning_rate for event in RunFolder(folder).events(StepsLogged)]


def steps_of(recipe: Recipe, records: int) -> int:
    batches = math.ceil(records / recipe.training.per_device_train_batch_size)
    return math.ceil(batches * (recipe.topology.local_epochs or 0))


@pytest.mark.parametrize("epochs", [1.0, 0.6, 0.01])
def test_each_site_takes_the_steps_of_its_own_records_and_all_have_one_schedule(
    paced: MakeRecipe, site_files: list[Path], tmp_path: Path, epochs: float
) -> None:
    """Linear: the k-th of a site's n steps is at 1 − k/n, so at each round's start all sites have one rate."""
    recipe = paced(local_epochs=epochs)
    summary = run(recipe, tmp_path / "run")
    assert summary.sites is not None
    taken = []
    for path in site_files:
        steps = steps_of(recipe, summary.sites[path.stem].train_examples)
        taken.append(steps)
        of_site = rates(tmp_path / "run" / "sites" / path.stem / "run")
        expected = [RATE * (1 - step / (ROUNDS * steps)) for step in range(ROUNDS * steps)]
        assert of_site == pytest.approx(expected)
    assert (len(set(taken)) > 1) is (epochs > 0.1)


@pytest.mark.parametrize("kind", ["federated", "central"])
def test_law_1_one_site_by_passes_is_central_training_by_as_many(
    paced: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    """In steps that are counted out beforehand, too."""
    shared = paced(site_files[1:2], local_epochs=0.6, training={"warmup_ratio": 0.2})
    shared = shared.model_copy(update={"data": shared.data.model_copy(update={"train": str(site_files[1])})})
    digest = run(shared, tmp_path / "federated").state_digest
    update: dict[str, Any] = {"kind": kind}
    if kind == "federated":
        engine = open_engine(shared)
        update |= {"local_epochs": None, "local_steps": engine.total_steps // ROUNDS}
        engine.close()
    other = shared.model_copy(update={"topology": shared.topology.model_copy(update=update)})
    if kind == "federated":
        assert run(other, tmp_path / "steps").state_digest == digest
        return
    folder = RunFolder(tmp_path / "central")
    folder.prepare(other, resume=False)
    assert train(other, open_engine(other), folder).state_digest == digest


def test_a_site_that_missed_a_round_goes_on_at_the_rate_of_the_others(paced: MakeRecipe, tmp_path: Path) -> None:
    recipe = paced(local_epochs=1)

    def fault(site: str, order: Envelope) -> str | None:
        lost = site == "site2" and order.kind == "train" and order.fields["round"] == 2
        return "before" if lost else None

    summary = federate(recipe, tmp_path / "run", fault)
    assert summary.sites is not None
    steps = steps_of(recipe, summary.sites["site2"].train_examples)
    rounds = [0, 2, 3]
    expected = [RATE * (1 - (n * steps + k) / (ROUNDS * steps)) for n in rounds for k in range(steps)]
    assert rates(tmp_path / "run" / "sites" / "site2" / "run") == pytest.approx(expected)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def test_law_4_a_run_by_passes_that_was_killed_goes_on_as_if_it_never_was(paced: MakeRecipe, tmp_path: Path) -> None:
    recipe = paced(local_epochs=0.6)
    whole = run(recipe, tmp_path / "whole")

    def kill(number: int, loss: float | None) -> None:
        if number == 2:
            raise Killed

    with pytest.raises(Killed):
        simulate(recipe, RunFolder(tmp_path / "killed"), kill)
    assert simulate(recipe, RunFolder(tmp_path / "killed"), resume=True).state_digest == whole.state_digest


@pytest.mark.parametrize("kind", ["federated", "gossip"])
def test_a_round_by_time_takes_one_step_at_least_and_starts_at_the_same_rate_everywhere(
    paced: MakeRecipe, site_files: list[Path], tmp_path: Path, kind: str
) -> None:
    recipe = paced(kind=kind, local_seconds=0.001)
    run(recipe, tmp_path / "run")
    folder = "run" if kind == "federated" else "simulation"
    for path in site_files:
        of_site = rates(tmp_path / "run" / "sites" / path.stem / folder)
        assert of_site == pytest.approx([RATE * (1 - number / ROUNDS) for number in range(ROUNDS)])


def test_a_slow_site_takes_fewer_steps_in_as_long_a_round(
    paced: MakeRecipe, site_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's slowness is its records': each batch of the first site's takes half of the round."""
    loss = Sft.loss

    def delayed(self: Sft, model: Any, batch: Any) -> Any:
        time.sleep(0.2 if int(batch["input_ids"].shape[0]) == 1 else 0.0)
        return loss(self, model, batch)

    monkeypatch.setattr(Sft, "loss", delayed)
    single = tiny.write_jsonl(tmp_path / "single.jsonl", tiny.questions(5, 1))
    recipe = paced([single, site_files[2]], local_seconds=0.4, training={"per_device_train_batch_size": 2})
    run(recipe, tmp_path / "run")
    slow, quick = (len(rates(tmp_path / "run" / "sites" / name / "run")) for name in ("single", "site2"))
    assert ROUNDS <= slow <= 2 * ROUNDS
    assert slow < quick


def test_a_server_believes_no_more_steps_than_a_sites_announced_records_make(paced: MakeRecipe) -> None:
    recipe = paced(local_epochs=0.5)
    data = DataReport(train_examples=41, eval_examples=0, truncated=0, dropped=0)
    assert most_steps(recipe, None, data, 1) == steps_of_a_round(recipe, 41, 1) == 6
    assert most_steps(recipe, None, data, 4) == 2
    assert most_steps(recipe, 5, data, 4) == 5


@pytest.mark.parametrize("records", range(1, 40))
@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.0, 2.5])
def test_passes_are_rounded_up_to_steps(paced: MakeRecipe, epochs: float, records: int) -> None:
    recipe = paced(local_epochs=epochs)
    batches = -(-records // 4)
    assert steps_of_a_round(recipe, records, 1) == -(-int(10 * epochs) * batches // 10)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"local_steps": 2}}, "local_epochs: how far a round goes is said by local_steps already"),
        ({"topology": {"kind": "gossip"}}, "topology.local_epochs: gossip nodes do not know each other's records"),
        ({"privacy": {"codec": "ring16"}}, "topology.local_epochs: ring16 is written on a scale"),
        ({"privacy": {"secure_aggregation": True}}, "topology.local_epochs: ring16 is written on a scale"),
        ({"aggregation": {"scaffold": True}, "training": {"optim": "sgd"}}, "SCAFFOLD takes all sites to have gone"),
        ({"training": {"warmup_steps": 5}}, "training.warmup_steps: by topology.local_epochs no two sites"),
        ({"training": {"lr_scheduler_type": "inverse_sqrt"}}, "inverse_sqrt goes by a number of steps"),
        (
            {"topology": {"local_epochs": None, "local_seconds": 5.0, "round_deadline": 5.0}},
            "topology.local_seconds: a site that trains for 5 s has not answered by round_deadline, 5 s",
        ),
        (
            {"topology": {"local_epochs": None, "local_seconds": 5.0, "kind": "central"}},
            "topology.local_seconds: a central run has no rounds that time could end",
        ),
        (
            {"topology": {"local_epochs": None, "local_seconds": 5.0}, "deepspeed": {"stage": 2}},
            "topology.local_seconds: the processes of a DeepSpeed group have a clock each",
        ),
    ],
)
def test_what_needs_every_site_to_take_as_many_steps_is_refused(
    make_recipe: MakeRecipe, sections: dict[str, Any], said: str
) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_epochs": 1.0, **sections.pop("topology", {})}
    training = {"max_steps": None, **sections.pop("training", {})}
    with pytest.raises(InputError) as error:
        make_recipe(topology=topology, training=training, **sections)
    assert said in str(error.value)
