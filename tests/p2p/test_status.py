"""What `fedloom p2p status` tells whoever alarms on it, from a node's folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from core_training.foundation import background
from core_training.foundation.health import Health
from p2p.deployment import node_lock, node_status
from p2p.node_folder import init_node


@pytest.fixture
def node(tmp_path: Path) -> Path:
    init_node(tmp_path / "node", "heart", "127.0.0.1:1", {"notes": ["/n"]}, {"m": "/m"}, None)
    return tmp_path / "node"


def with_run(node: Path, event: dict[str, Any], seconds_ago: float = 0.0) -> None:
    """Let a run's newest event have been so long ago."""
    (node / "run").mkdir(exist_ok=True)
    (node / "run" / "current.json").write_text(json.dumps({"run_id": "r", "epochs": 3}))
    (node / "runs" / "r").mkdir(parents=True, exist_ok=True)
    time = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="milliseconds")
    started = {"time": time, "event": "started", "site": "heart", "run": "r", "roster": ["heart", "lung"]}
    lines = [json.dumps(line) for line in (started, {"time": time, **event})]
    (node / "runs" / "r" / "events.jsonl").write_text("\n".join(lines) + "\n")


def test_a_node_that_never_ran_does_not_run(node: Path) -> None:
    status = node_status(node)
    assert (status.health, status.certificate_ends is not None) == (Health.NOT_RUNNING, True)


def test_a_node_that_was_killed_says_how_to_go_on_and_one_that_is_done_is_well(node: Path) -> None:
    with_run(node, {"event": "gathered", "live": [], "missing": ["lung"]})
    status = node_status(node)
    assert (status.state, status.health) == ("stopped", Health.NOT_RUNNING)
    assert f"`fedloom p2p start --folder {node}`" in " ".join(status.attention)
    with_run(node, {"event": "run_completed", "state_digest": "0", "eval_loss": None})
    assert (node_status(node).state, node_status(node).health) == ("completed", Health.WELL)


@pytest.mark.parametrize(("seconds", "health"), [(5, Health.WELL), (300, Health.NEEDS_A_PERSON)])
def test_a_node_that_waits_long_for_its_peers_needs_a_person(node: Path, seconds: float, health: Health) -> None:
    with_run(node, {"event": "waiting", "missing": ["lung"]}, seconds)
    with background.claim(node_lock(node)):
        status = node_status(node)
    assert status.health == health
    assert any("waiting for lung" in what for what in status.attention) == (health == Health.NEEDS_A_PERSON)
