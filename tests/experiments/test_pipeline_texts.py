"""`${NAME}` in a step's texts is a step's folder; `$${NAME}` is those characters themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from core_training.foundation.errors import InputError
from experiments.pipeline import Pipeline, load_pipeline


def pipeline(folder: Path, column: str) -> Pipeline:
    recipe: dict[str, Any] = {
        "model": {"name_or_path": "org/model"},
        "stage": "sft",
        "data": {"train": "records.jsonl"},
    }
    written = {**recipe, "data": {"train": "records.jsonl", "columns": {"prompt": column, "completion": "answer"}}}
    document = {"steps": {"sft": {"recipe": recipe}, "later": {"recipe": written}}}
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return load_pipeline(path, folder / "runs")


@pytest.mark.parametrize(
    ("written", "meant", "after"),
    [
        ("costs $${x}", "costs ${x}", ()),
        ("$${sft}", "${sft}", ()),
        ("$${sft} of ${sft}", "${sft} of FOLDER/sft", ("sft",)),
        ("$$${x}", "$${x}", ()),
        ("$$ and $x and {x}", "$$ and $x and {x}", ()),
    ],
)
def test_a_doubled_dollar_is_the_characters_themselves(
    tmp_path: Path, written: str, meant: str, after: tuple[str, ...]
) -> None:
    later = pipeline(tmp_path, written).steps[1]
    told = later.step.settings["recipe"]["data"]["columns"]["prompt"]
    assert told == meant.replace("FOLDER", str(tmp_path / "runs"))
    assert later.after == after


def test_a_name_that_is_no_step_is_told_with_the_way_to_write_the_characters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"steps\.later: \$\{x\} is no step; .*write \$\$\{x\} for the characters"):
        pipeline(tmp_path, "costs ${x}")
