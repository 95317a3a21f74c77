"""The demo from beginning to end, cut short: nothing is learnt, but every way of training leaves what it should."""

import json
from pathlib import Path

import pytest

from core_training.runs.run_folder import RunFolder
from examples.demo.findings import publish, show
from examples.demo.story import FOLDER, tell

SHORT = ("topology.rounds=2", "topology.local_steps=1", "tuning.lora.r=2")


@pytest.mark.slow
def test_every_way_of_training_leaves_its_figures_and_the_page_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (FOLDER / "old").mkdir(parents=True)
    findings = tell(SHORT, ("training.max_steps=3",))
    publish(findings)
    show(findings)

    assert not (FOLDER / "old").exists()
    summary = json.loads((FOLDER / "summary.json").read_text())
    for way in ("local_only", "federated", "gossip", "central"):
        assert summary[way]["eval_loss"] > 0
        assert 0 <= summary[way]["accuracy"] <= 1
        assert set(summary[way]["hospitals"]) == {"heart", "lung", "skin"}
    # The examiner reads the files of the result; the run evaluated what it had in memory.
    for way in ("federated", "gossip", "central"):
        recorded = RunFolder(FOLDER / way).summary()
        assert recorded is not None
        assert summary[way]["eval_loss"] == pytest.approx(recorded["eval_loss"], rel=1e-5)
    # All peers in one group compute what a server computes (law 3).
    assert summary["gossip"]["eval_loss"] == pytest.approx(summary["federated"]["eval_loss"], abs=1e-6)
    # The same examples for central training as for the three hospitals together.
    events = list(RunFolder(FOLDER / "central").lines("trained"))
    assert events[-1]["step"] == 3 * 2 * 1

    page = (FOLDER / "report.html").read_text(encoding="utf-8")
    for label in ("heart alone", "alone, on average", "federated", "gossip", "central"):
        assert f"<td>{label}</td>" in page
