"""`fedloom report`: every run that is there is drawn, whatever its topology and its end; anything else is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder, Summary
from fedloom.commands.report import app
from fedloom.curves_page import write_curves
from fedloom.run_curves import read_runs

MakeRecipe = Callable[..., Recipe]


def logged(step: int, loss: float, round_number: int | None = None, **figures: float) -> events.StepsLogged:
    return events.StepsLogged(
        step=step, loss=loss, weight=4, learning_rate=0.1 / step, grad_norm=0.5, tokens=8, tokens_per_second=2.0 * step,
        round=round_number, figures=figures,
    )  # fmt: skip


def central(recipe: Recipe, path: Path, complete: bool = True) -> Path:
    """Points at 10 and 20, evaluations at 0 and 20."""
    folder = RunFolder(path)
    folder.prepare(recipe, resume=False)
    for event in (
        events.CentralStarted(total_steps=20, train_examples=1, eval_examples=1, truncated=0, dropped=0),
        events.Evaluated(step=0, loss=3.0, evaluation={}),
        logged(10, 2.0, reward=0.25),
        logged(20, 1.0, reward=0.5),
        events.Evaluated(step=20, loss=1.5, evaluation={}),
    ):
        folder.event(event)
    if complete:
        summary = Summary(topology="central", stage="sft", tuning="lora", status="completed", eval_loss=1.5)
        summary.tokens_trained, summary.seconds = 1234, {"total": 7.0}
        folder.write_summary(summary)
        folder.event(events.CentralCompleted(step=20, eval_loss=1.5))
    return path


def federated(make_recipe: MakeRecipe, path: Path) -> Path:
    """Two rounds of five steps at two sites; the run goes on."""
    folder = RunFolder(path)
    folder.prepare(make_recipe(topology={"kind": "federated", "rounds": 4, "local_steps": 5}), resume=False)
    folder.event(events.FederatedStarted(rounds=4))
    for number in (1, 2):
        folder.event(events.Round(round=number, loss=4.0 - number, eval_loss=5.0 - number, sites={"a": {}, "b": {}}))
        for site in ("a", "b"):
            RunFolder(path / "sites" / site / "run").event(logged(5 * number, 1.0, number))
    return path


def test_a_central_runs_lines_are_what_was_measured(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (run,) = read_runs([central(make_recipe(), tmp_path / "run")])
    assert run.lines["loss"] == ((10, 20), (2.0, 1.0))
    assert run.lines["eval_loss"] == ((0, 20), (3.0, 1.5))
    assert run.lines["learning_rate"] == ((10, 20), (0.01, 0.005))
    assert run.lines["reward"] == ((10, 20), (0.25, 0.5))
    assert run.of_sites == {}
    assert (run.state, run.steps) == ("completed", 20)


def test_a_federated_runs_losses_are_its_own_and_the_rest_its_sites(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (run,) = read_runs([federated(make_recipe, tmp_path / "run")])
    assert run.lines["loss"] == ((5, 10), (3.0, 2.0))
    assert run.lines["eval_loss"] == ((0, 5), (4.0, 3.0))
    assert run.of("grad_norm") == [((5, 10), (0.5, 0.5))] * 2
    assert run.of("loss") == [run.lines["loss"]]
    assert run.state == "training"


def test_a_gossip_nodes_and_a_sites_folder_are_drawn_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A node's rounds are in its events alone, beside the steps of its worker, in one folder."""
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_recipe(topology={"kind": "gossip", "rounds": 4, "local_steps": 5}), resume=False)
    folder.event(logged(5, 1.0, 1))
    folder.event(events.SliceTrained(round=1, loss=1.0, eval_loss=2.0))
    (run,) = read_runs([folder.path])
    assert run.lines["eval_loss"] == ((0,), (2.0,))
    assert run.lines["loss"] == ((5,), (1.0,))
    assert run.lines["learning_rate"] == ((5,), (0.02,))


def test_a_run_of_an_earlier_version_has_its_evaluations(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = central(make_recipe(), tmp_path / "run")
    (path / "curve.jsonl").unlink()
    (run,) = read_runs([path])
    assert run.lines == {"eval_loss": ((0, 20), (3.0, 1.5))}


def test_the_page_is_one_file_with_curves_table_and_differences(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    one = central(make_recipe(training={"learning_rate": 0.01}), tmp_path / "one")
    two = central(make_recipe(training={"learning_rate": 0.02}), tmp_path / "two", complete=False)
    RunFolder(two).event(events.Failed(reason="out of <memory>"))
    outcome = CliRunner().invoke(app, [str(one), str(two), "--to", str(tmp_path / "report.html"), "--json"])
    assert outcome.exit_code == 0, outcome.output
    told = json.loads(outcome.stdout)
    assert told["report"] == str(tmp_path / "report.html")
    assert [run["steps"] for run in told["runs"]] == [20, 20]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>failed: out of &lt;memory&gt;</td>" in page
    assert "<td>training.learning_rate</td><td>0.01</td><td>0.02</td>" in page
    assert "<td>output</td>" not in page
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "http" not in page.replace("http-equiv", "")


def test_the_picture_names_every_figure_once_and_every_run_in_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    import matplotlib as mpl

    runs = read_runs([central(make_recipe(), tmp_path / "one"), federated(make_recipe, tmp_path / "two")])
    with mpl.rc_context({"svg.fonttype": "none"}):  # text as text
        write_curves(runs, tmp_path / "report.svg")
    texts = [text.text for text in ElementTree.parse(tmp_path / "report.svg").iter("{http://www.w3.org/2000/svg}text")]
    for title in ("Training loss", "Loss on the held-out records", "Learning rate", "Tokens per second", "reward"):
        assert texts.count(title) == 1
    assert texts.count("one") == 6
    assert texts.count("two") == 5, "its sites are one entry, and it has no reward"
    write_curves(runs, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_file_the_report_lies_in_the_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = central(make_recipe(), tmp_path / "run")
    assert CliRunner().invoke(app, [str(path), "--quiet"]).exit_code == 0
    assert (path / "report.html").is_file()


def test_a_run_without_a_figure_yet_is_a_page_and_no_picture(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.prepare(make_recipe(), resume=False)
    runs = read_runs([folder.path])
    write_curves(runs, tmp_path / "report.html")
    assert "There are no figures yet to draw." in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match=r"run: no figures yet to draw"):
        write_curves(runs, tmp_path / "report.png")


@pytest.mark.parametrize(
    ("run", "to", "message"),
    [
        ("there-is-none", None, "there-is-none: no such run folder"),
        (".", None, r"not a run folder \(it has no recipe\.yaml\)"),
        ("run", "report.pdf", r"report\.pdf: a report is a file that ends with \.html, \.svg or \.png"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    make_recipe: MakeRecipe, tmp_path: Path, run: str, to: str | None, message: str
) -> None:
    central(make_recipe(), tmp_path / "run")
    arguments: list[Any] = [str(tmp_path / run), *(["--to", str(tmp_path / to)] if to else [])]
    outcome = CliRunner().invoke(app, arguments)
    assert isinstance(outcome.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise outcome.exception


def test_the_command_loads_no_pytorch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = central(make_recipe(), tmp_path / "run")
    program = (
        "import sys; from typer.testing import CliRunner; from fedloom.commands.report import app\n"
        f"outcome = CliRunner().invoke(app, [{str(path)!r}]); assert outcome.exit_code == 0, outcome.output\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
