"""The run folder: one process at a time, and events that survive what cut the last one short."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from core_training.engine.dataset import load_dataset
from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import InputError, RunError
from core_training.recipe.schema import Recipe
from core_training.runs.events import (
    Event,
    Failed,
    NodeCompleted,
    NodeRound,
    NodeStarted,
    ResumedAtStep,
    RoundsCompleted,
)
from core_training.runs.run_folder import RunFolder
from strategies.messages import RUN_ID
from tests import tiny


def all_kinds(kind: type[Event] = Event) -> set[type[Event]]:
    below = {one for child in kind.__subclasses__() for one in all_kinds(child)}
    return below | ({kind} if kind.NAME else set())


def made_up(annotation: str) -> Any:
    """A value of a field's type."""
    if "Mapping" in annotation:
        known = {"Mapping[str, float]": {"a": 1.5}, "Mapping[str, str]": {"a": "words"}, "Mapping[str, int]": {"a": 1}}
        return known.get(annotation, {"a": {"loss": 1.0}})
    return ["a"] if "Sequence" in annotation else {"i": 1, "f": 1.5, "b": True}.get(annotation[0], "words")


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").claimed():
        with pytest.raises(InputError, match=rf"running already \(process {os.getpid()}\)"):
            RunFolder(tmp_path / "run").claimed().__enter__()
        with RunFolder(tmp_path / "other").claimed():
            pass
    with RunFolder(tmp_path / "run").claimed():
        pass


def test_an_event_cut_short_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.event(Failed(reason="no disk"))
    with (tmp_path / "events.jsonl").open("ab") as stream:
        stream.write(b'{"event": "cut sho')
    folder.event(ResumedAtStep(step=3))
    assert [event["event"] for event in folder.lines()] == ["failed", "resumed"]


@pytest.mark.parametrize("kind", sorted(all_kinds(), key=lambda kind: kind.__name__))
def test_every_event_is_read_back_from_its_line(tmp_path: Path, kind: type[Event]) -> None:
    """Kinds that share a name are told apart by their fields."""
    made = kind(**{one.name: made_up(str(one.type)) for one in fields(kind)})
    folder = RunFolder(tmp_path)
    folder.event(made)
    assert list(folder.events(Event)) == [made]
    assert type(next(folder.events(kind))) is kind


def test_a_node_of_an_earlier_version_called_its_rounds_epochs(tmp_path: Path) -> None:
    shared = {"loss": 2.0, "eval_loss": None, "eval_weight": 1.0, "weight": 1.0, "seconds": 1.0, "of": 3}
    line = {"event": "epoch", "epoch": 2, **shared, "contributors": ["a"], "live": [], "state_digest": None}
    folder = RunFolder(tmp_path)
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + "\n")
    (event,) = folder.events(NodeRound)
    assert (event.round, folder.status().round) == (2, 2)
    folder.event(event)
    (_, written) = folder.lines("epoch")
    assert (written["round"], written["epoch"]) == (2, 2)


def test_lines_of_another_version_are_read_as_far_as_they_are_known(tmp_path: Path) -> None:
    lines = [
        {"event": "round", "round": 1, "loss": 2.0, "eval_loss": None, "sites": {"a": {}}, "mood": "good"},
        {"event": "late", "site": "b"},
        {"event": "invented", "by": "another version"},
        {"event": "round", "round": 2, "loss": 2.0, "eval_loss": None, "sites": {"a": None}},
        {"event": "waiting", "missing": 3},
        {"event": "late", "site": "b", "round": "2", "order": "train"},
        {"event": ["started"], "rounds": 1},
        ["no event at all"],
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = RunFolder(tmp_path)
    assert [type(event).__name__ for event in folder.events(Event)] == ["Round", *["Unknown"] * 6]
    status = folder.status()
    assert (status.round, status.state, list(status.sites)) == (1, "training", ["a"])


def test_a_node_has_completed_when_it_says_so_and_not_its_worker(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.event(NodeStarted(site="a", run="r", roster=["a", "b"]))
    folder.event(RoundsCompleted(round=3, eval_loss=1.0))
    assert folder.status().state == "starting"
    folder.event(NodeCompleted(state_digest="0" * 64, eval_loss=1.0))
    assert folder.status().state == "completed"


@pytest.mark.parametrize("name", ["my run", "..hidden", "Ärzte", "a" * 300, "-"])
def test_any_folder_name_makes_a_run_id(name: str) -> None:
    import re

    assert re.match(RUN_ID, RunFolder(Path("runs") / name).run_id)


def test_a_commit_that_fails_between_its_two_renames_leaves_the_earlier_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "kept"
    with commit_folder(target) as scratch:
        (scratch / "value").write_text("old")
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("the disk is gone")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunError, match="is intact"), commit_folder(target) as scratch:
        (scratch / "value").write_text("new")
    assert (target / "value").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_records_of_the_evaluation_file_are_left_out_of_training(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    everything = tiny.questions(0, 20)
    tiny.write_jsonl(tmp_path / "train.jsonl", everything)
    tiny.write_jsonl(tmp_path / "held_out.jsonl", everything[:5])
    recipe = make_recipe(data={"train": str(tmp_path / "*.jsonl"), "eval": str(tmp_path / "held_out.jsonl")})
    dataset = load_dataset(recipe, tiny.stage_of(recipe))
    trained = {tiny.token_ids(row) for row in dataset.rows}
    evaluated = {tiny.token_ids(row) for rows in dataset.evaluation.values() for row in rows}
    assert (len(trained), len(evaluated)) == (15, 5)
    assert not trained & evaluated
