"""The contracts name files that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(
    r'"((?:core_training|flower_transport|server|client|p2p|strategies|simulations|fedloom|security)/[\w/]+\.py)"'
)


@pytest.mark.parametrize("contract", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_the_files_that_a_contract_names_are_there(contract: Path) -> None:
    files = set(NAMED.findall(contract.read_text(encoding="utf-8")))
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == [], f"{contract.name}: they have moved"
