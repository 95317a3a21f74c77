"""docs/data.md and the README show what `fedloom data show` prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.fedloom.conftest import Command
from tests.test_docs import ROOT, fenced

PAGE = ROOT / "docs" / "data.md"


def test_the_page_shows_what_is_printed(
    fedloom: Command, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make docs` writes the block anew: DATA_PAGE=1 runs this test so."""
    monkeypatch.chdir(tmp_path)
    records = next(iter(fenced(PAGE, "jsonl")))
    Path("visits.jsonl").write_text(records)
    recipe = yaml.safe_load(fenced(PAGE, "yaml")[0])
    recipe["model"]["name_or_path"] = str(tiny_model)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    shown = fedloom("data", "show", "recipe.yaml")
    assert shown.code == 0, shown.err
    printed = "$ fedloom data show recipe.yaml\n" + shown.out + shown.err
    (block,) = fenced(PAGE, "console")
    if os.environ.get("DATA_PAGE"):
        PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(block, printed), encoding="utf-8")
        return
    assert block == printed, "make docs"
    (shortened,) = (body for body in fenced(ROOT / "README.md", "console") if body.startswith("$ fedloom data show"))
    assert set(shortened.splitlines()) - {"…"} <= set(printed.splitlines())
