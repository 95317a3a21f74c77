"""Whether tests have a real program of others to run: which must be there where make says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evaluation.bridges.own_environments import OwnEnvironment

RECORDED = Path(__file__).with_name("recorded")
REQUIRED = "BRIDGES_REQUIRED"
"""The variable under which an environment that is not there is a failure."""
RECORD = "BRIDGES_RECORD"
"""The variable under which what the real programs write takes the place of what is recorded."""


def environment(kind: OwnEnvironment) -> Path:
    """The environment's folder; the test is skipped, with the reason told, where there is none."""
    if (folder := kind.found(None)) is not None:
        return folder
    words = f"not run: {kind.title}, whose environment is not there; `make {kind.name}` makes it and runs these"
    if os.environ.get(REQUIRED):
        pytest.fail(words)
    pytest.skip(words)
