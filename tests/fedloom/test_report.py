"""The report: figures as in the run folders, one file that needs no other, and the same bytes for the same runs."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from core_training.foundation.errors import InputError
from core_training.recipe.reading import parse_recipe
from core_training.runs.events import Evaluated, NodeRound, Round
from core_training.runs.run_folder import RunFolder, Summary
from fedloom.report import Curve, Report, read_curve, read_entry, write_picture, write_report


def make_run(path: Path, kind: str, eval_loss: float = 0.5, complete: bool = True) -> RunFolder:
    """A run folder of 3 rounds of 10 steps on batches of 4 × 2 examples."""
    recipe = parse_recipe(
        "model: {name_or_path: base}\n"
        "stage: sft\n"
        "training: {per_device_train_batch_size: 4, gradient_accumulation_steps: 2}\n"
        f"topology: {{kind: {kind}, rounds: 3, local_steps: 10}}"
    )
    folder = RunFolder(path)
    folder.prepare(recipe, resume=False)
    if complete:
        folder.write_summary(
            Summary(
                topology=kind, stage="sft", tuning="lora", status="completed", rounds=3, eval_loss=eval_loss,
                metrics={"exact_match": 0.75}, tokens_trained=1000, seconds={"total": 12.0},
                bytes_up=None if kind == "central" else 3_000_000, bytes_down=None if kind == "central" else 1_000_000,
            )
        )  # fmt: skip
    return folder


def central_run(path: Path, losses: tuple[float, ...]) -> Path:
    run = make_run(path, "central", eval_loss=losses[-1])
    for index, loss in enumerate(losses):
        run.event(Evaluated(step=10 * index, loss=loss, evaluation={}))
    return path


def test_a_central_curve_counts_examples_by_steps_and_batch(tmp_path: Path) -> None:
    run = central_run(tmp_path / "run", (2.0, 1.0, 0.5))
    assert read_curve(run) == Curve((0.0, 80.0, 160.0), (2.0, 1.0, 0.5))


def test_a_federated_curve_counts_all_sites_and_ends_with_the_result(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "federated")
    for number, loss in ((1, 2.0), (2, None), (3, 1.0)):
        run.event(Round(round=number, loss=None, eval_loss=loss, sites={"a": {}, "b": {}}))
    assert read_curve(run.path) == Curve((0.0, 320.0, 480.0), (2.0, 1.0, 0.5))


def node_round(number: int, eval_loss: float) -> NodeRound:
    return NodeRound(
        round=number, of=2, loss=1.0, eval_loss=eval_loss, eval_weight=1, weight=1, seconds=1.0, contributors=[],
        live=[], state_digest=None,
    )  # fmt: skip


def test_a_gossip_curve_is_the_nodes_mean(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "gossip")
    for site, losses in (("a", (2.0, 1.0)), ("b", (4.0, 2.0))):
        for number, loss in enumerate(losses, start=1):
            RunFolder(run.path / "sites" / site).event(node_round(number, loss))
    assert read_curve(run.path) == Curve((0.0, 160.0, 480.0), (3.0, 1.5, 0.5))


def test_several_runs_as_one_line_average_losses_and_add_the_rest(tmp_path: Path) -> None:
    one, two = central_run(tmp_path / "one", (2.0, 1.0)), central_run(tmp_path / "two", (4.0, 3.0))
    entry = read_entry("alone", one, two)
    assert entry.curve == Curve((0.0, 160.0), (3.0, 2.0))
    assert (entry.eval_loss, entry.accuracy, entry.tokens, entry.seconds) == (2.0, 0.75, 2000, 24.0)
    assert entry.traffic is None


def test_a_run_that_has_not_ended_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "central", complete=False)
    with pytest.raises(InputError, match=r"run: there is no completed run here"):
        read_entry("central", run.path)


class _Links(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def example_report(tmp_path: Path) -> Report:
    central = replace(read_entry("central <all>", central_run(tmp_path / "c", (2.0, 0.5))), by_group={"heart": 0.987})
    return Report("A & B", ("Five < six.",), [central], commands=("fedloom train r.yaml 'a=\"<b>\"'",))


def test_the_page_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    write_report(example_report(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert len(links.found) == 2
    for link in links.found:
        kind, _, content = link.partition(";base64,")
        assert kind == "data:image/svg+xml"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
    assert "<script" not in page


def test_the_page_shows_figures_and_escapes_words(tmp_path: Path) -> None:
    write_report(example_report(tmp_path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells == ["central &lt;all&gt;", "0.500", "75.0 %", "98.7 %", "1,000", "–", "12"]
    assert "<h1>A &amp; B</h1>" in page
    assert "Five &lt; six." in page
    assert "a=&quot;&lt;b&gt;&quot;" in page


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    report = example_report(tmp_path)
    for name in ("one", "two"):
        write_report(report, tmp_path / f"{name}.html")
        write_picture(report, tmp_path / f"{name}.png")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
