"""The contracts name files that there are."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

NAMED = re.compile(
    r'"((?:core_training|flower_transport|server|client|p2p|strategies|simulations|fedloom|security)/[\w/]+\.py)"'
)


@pytest.mark.parametrize("contract", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_the_files_that_a_contract_names_are_there(contract: Path) -> None:
    files = set(NAMED.findall(contract.read_text(encoding="utf-8")))
    assert [file for file in sorted(files) if not is_there(file)] == [], f"{contract.name}: they have moved"


def is_there(file: str) -> bool:
    """Whether a file of ours is where it is imported from: the checkout, or an installed wheel."""
    try:
        return find_spec(file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")) is not None
    except ModuleNotFoundError:
        return False
