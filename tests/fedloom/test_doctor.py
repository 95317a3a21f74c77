"""`fedloom doctor` names what is there, what is lacking, and the remedy; it exits 1 only for the indispensable."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from fedloom import machine
from fedloom.machine import Finding, State, examine
from tests.fedloom.conftest import Command


def finding(name: str) -> Finding:
    return next(one for one in examine() if one.name == name)


def test_it_describes_this_machine_in_a_table_and_as_json(fedloom: Command) -> None:
    outcome = fedloom("doctor", "--json")
    document = json.loads(outcome.out)
    findings = {one["name"]: one for one in document["findings"]}
    assert (outcome.code, document["ready"]) == (0, True)
    assert findings["Python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert torch.__version__ in findings["torch"]["found"]
    assert findings["cores"]["found"].startswith(f"{len(os.sched_getaffinity(0))} usable")
    assert {
        "GPU",
        "memory",
        "disk",
        "C++ compiler",
        "ninja",
        "deepspeed",
        "ray",
        "dp-accounting",
        "Flower",
        "calls home",
    } <= findings.keys()
    table = fedloom("doctor")
    assert table.code == 0
    assert all(name in table.out for name in findings)
    assert "fedloom can run here." in table.out


def test_everything_that_falls_short_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With an empty search path, no extras, no memory to speak of and a changed environment."""
    monkeypatch.setattr(machine, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(machine, "_version", lambda package: None)
    monkeypatch.setattr(machine, "MEMORY_BYTES", 2**60)
    monkeypatch.setattr(machine, "DISK_BYTES", 2**70)
    monkeypatch.setattr(machine, "_cpu_flags", set)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    findings = {one.name: one for one in examine()}
    for name in ("C++ compiler", "ninja", "deepspeed", "ray", "memory", "disk", "AVX512-BF16", "AES"):
        assert findings[name].state is State.OPTIONAL, name
    for name in ("libraries", "Flower", "calls home"):
        assert findings[name].state is State.MISSING, name
    assert all(one.remedy for one in findings.values() if one.state is not State.OK)
    assert findings["ray"].remedy == "pip install 'fedloom[simulation]'"
    assert "HF_HUB_OFFLINE" in findings["calls home"].found


def test_without_the_indispensable_it_exits_with_1(fedloom: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PYTHON", (99, 0))
    monkeypatch.setenv("COLUMNS", "200")
    outcome = fedloom("doctor", "--json")
    assert (outcome.code, json.loads(outcome.out)["ready"]) == (1, False)
    outcome = fedloom("doctor")
    assert outcome.code == 1
    assert "install Python 99.0 or newer" in outcome.out
    assert "fedloom cannot run here" in outcome.out


def test_a_port_in_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(machine, "SERVER_PORT", port)
        assert finding(f"port {port}").state is State.OPTIONAL
        assert "in use" in finding(f"port {port}").found
    assert finding(f"port {port}").state is State.OK


def test_a_library_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda package: "0.1" if package == "peft" else real(package))
    assert finding("libraries").state is State.MISSING
    assert finding("libraries").found.startswith("peft 0.1 (")
