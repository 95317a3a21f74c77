"""Trackers: what they are told, where it lies, and that nothing of theirs ends a run or leaves the machine."""

from __future__ import annotations

import csv
import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core_training.engine.central import train
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs import trackers
from core_training.runs.events import Evaluated, StepsLogged
from core_training.runs.run_folder import RunFolder
from core_training.runs.trackers import check_trackers, reporting

MakeRecipe = Callable[..., Recipe]


def logged(step: int, loss: float) -> StepsLogged:
    return StepsLogged(
        step=step, loss=loss, weight=4, learning_rate=0.1, grad_norm=None, tokens=8, tokens_per_second=2.0
    )


def run(recipe: Recipe, path: Path) -> RunFolder:
    folder = RunFolder(path)
    engine = open_engine(recipe)
    folder.prepare(recipe, resume=False)
    train(recipe, engine, folder, heeds_signals=False)
    return folder


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed")


@pytest.fixture
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every address of the network is behind a proxy of ours, and nobody comes there."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for name in (variable, variable.lower()):
                monkeypatch.setenv(name, address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_csv_is_the_curve_as_a_table(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(training={"max_steps": 5, "logging_steps": 2, "report_to": "csv"})
    folder = run(recipe, tmp_path / "run")
    with (tmp_path / "run" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    for row, expected in zip(rows, folder.curve(), strict=True):
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens"):
            assert row[name] == ("" if expected.get(name) is None else str(expected[name]))


def test_csv_is_written_where_a_run_fails(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, folder = make_recipe(training={"report_to": ["csv"]}), RunFolder(tmp_path)

    def fails() -> None:
        with reporting(recipe, folder, since=0):
            folder.event(logged(10, 1.0))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert (tmp_path / "curve.csv").read_text().splitlines()[1].startswith("10,1.0,")


@pytest.mark.parametrize(("given", "expected"), [("csv", ["csv"]), ("none", []), (None, []), (["csv"], ["csv"])])
def test_one_a_list_or_none_can_be_given(make_recipe: MakeRecipe, given: Any, expected: list[str]) -> None:
    assert make_recipe(training={"report_to": given}).training.report_to == expected


def test_an_unknown_tracker_is_named_with_those_that_are_known(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"training\.report_to.*'tensorboard', 'wandb', 'mlflow', 'trackio' or 'csv'"):
        make_recipe(training={"report_to": "tensorbord"})


def test_a_library_that_is_missing_is_named_with_the_remedy(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers._LIBRARIES, "wandb", ("there_is_no_such_library",))
    with pytest.raises(InputError, match=r"training\.report_to: wandb is not installed here; pip install wandb"):
        check_trackers(make_recipe(training={"report_to": ["csv", "wandb"]}))


class Recorder:
    """A tracker as accelerate has them, registered as users register theirs; it keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.told.append(("start", None))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("recipe", values))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.told.append(("log", (step, values)))

    def finish(self) -> None:
        self.told.append(("finish", None))


def test_a_tracker_is_told_the_recipe_and_each_measurement_in_order(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(trackers, "_MAKERS", {"csv": lambda folder, since: recorder})
    folder = RunFolder(tmp_path)
    with reporting(make_recipe(training={"report_to": "csv", "max_steps": 7}), folder, since=0):
        folder.event(logged(10, 1.0))
        folder.event(Evaluated(step=10, loss=2.0, evaluation={}))
        folder.event(Evaluated(step=20, loss=None, evaluation={}))
    folder.event(logged(30, 1.0))
    kinds = [kind for kind, _ in recorder.told]
    assert kinds == ["start", "recipe", "log", "log", "log", "finish"]
    settings = recorder.told[1][1]
    assert (settings["training.max_steps"], settings["stage"]) == (7, "sft")
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())
    figures = {"loss": 1.0, "weight": 4, "learning_rate": 0.1, "tokens": 8, "tokens_per_second": 2.0}
    assert [what for kind, what in recorder.told if kind == "log"] == [
        (10, figures),
        (10, {"eval_loss": 2.0}),
        (20, {}),
    ]


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Recorder):
        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            raise OSError("the disk is full")

    failing = Fails()
    monkeypatch.setitem(trackers._MAKERS, "csv", lambda folder, since: failing)  # type: ignore[index]
    recipe = make_recipe(training={"max_steps": 4, "logging_steps": 1, "report_to": "csv"})
    folder = run(recipe, tmp_path)
    assert [row["step"] for row in folder.curve()] == [0, 1, 2, 3, 4]
    said = [record.getMessage() for record in caplog.records if "report_to" in record.getMessage()]
    assert said == ["training.report_to: csv failed and is told no more: the disk is full"]


def test_a_tracker_that_cannot_start_ends_the_run_before_its_first_step(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreachable(Recorder):
        def start(self) -> None:
            raise ConnectionError("no server")

    monkeypatch.setitem(trackers._MAKERS, "csv", lambda folder, since: Unreachable())  # type: ignore[index]
    with pytest.raises(InputError, match=r"training\.report_to: csv cannot be started: no server"):
        run(make_recipe(training={"report_to": "csv"}), tmp_path)


@needs("tensorboard")
def test_tensorboard_has_each_point_once_also_after_a_resume(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, folder = make_recipe(training={"report_to": "tensorboard"}), RunFolder(tmp_path)
    with reporting(recipe, folder, since=0):
        for step in (10, 20, 30):
            folder.event(logged(step, 100.0 + step))
        folder.event(Evaluated(step=30, loss=7.0, evaluation={}))
    with reporting(recipe, folder, since=15):
        for step in (20, 30):
            folder.event(logged(step, 200.0 + step))
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [(one.step, one.value) for one in written.Scalars("loss")] == [(10, 110.0), (20, 220.0), (30, 230.0)]
    assert [one.step for one in written.Scalars("learning_rate")] == [10, 20, 30]


@needs("wandb")
@pytest.mark.usefixtures("nothing_is_sent")
@pytest.mark.slow
def test_wandb_writes_offline_into_the_run_folder(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in trackers._CALM_WANDB:
        monkeypatch.delenv(variable, raising=False)
    run(make_recipe(training={"max_steps": 2, "report_to": "wandb"}), tmp_path / "run")
    assert os.environ["WANDB_MODE"] == "offline"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


@needs("mlflow")
@pytest.mark.usefixtures("nothing_is_sent")
@pytest.mark.slow
def test_mlflow_writes_into_the_run_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run(make_recipe(training={"max_steps": 3, "logging_steps": 1, "report_to": "mlflow"}), tmp_path / "run")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{(tmp_path / 'run' / 'mlflow' / 'mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name(trackers.PROJECT)
    (written,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(written.info.run_id, "loss")] == [1, 2, 3]
    assert written.data.params["training.max_steps"] == "3"


@needs("trackio")
@pytest.mark.usefixtures("nothing_is_sent")
@pytest.mark.slow
def test_trackio_writes_into_the_run_folder(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    run(make_recipe(training={"max_steps": 2, "report_to": "trackio"}), tmp_path / "run")
    assert (tmp_path / "run" / "trackio" / "fedloom.db").is_file()
