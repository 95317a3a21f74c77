"""`fedloom client status` over what a site's folder may hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom.commands.client import app


@pytest.mark.parametrize("events", ["", '{"event": "trai', '{"event": "trained", "round": 1}\n{"ev'])
def test_empty_and_torn_events_are_passed_over(tmp_path: Path, events: str) -> None:
    (tmp_path / "site.yaml").write_text("name: a\n")
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text(events)
    shown = CliRunner().invoke(app, ["status", "--folder", str(tmp_path), "--json"])
    assert shown.exit_code == 4, shown.exception
    assert json.loads(shown.stdout)["runs"] == ({"r": {"event": "trained", "round": 1}} if "trained" in events else {})
