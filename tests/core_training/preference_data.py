"""Made-up records for each stage, and recipes on them. The better answers send to a ward, the worse ones dismiss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core_training.recipe.schema import Recipe
from tests import tiny

MakeRecipe = Callable[..., Recipe]


def pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """Questions with a better and a worse answer."""
    return [
        {
            "prompt": record["question"],
            "chosen": record["answer"],
            "rejected": record["answer"].replace("See the", "Never mind the"),
        }
        for record in tiny.questions(seed, count)
    ]


def feedback(seed: int, count: int) -> list[dict[str, Any]]:
    """The answers of `pairs`, one by one, with a mark; both answers to a question stand side by side."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs(seed, count)
        for name in ("chosen", "rejected")
    ]


def records(stage: str, seed: int, count: int) -> list[dict[str, Any]]:
    """`count` records (twice as many for `kto` and `sft`, which learns both answers) that a stage can train on."""
    if stage == "pretrain":
        return list(tiny.texts(seed, count))
    if stage == "kto":
        return feedback(seed, count)
    if stage == "sft":
        return [{"prompt": r["prompt"], "completion": r["completion"]} for r in feedback(seed, count)]
    return pairs(seed, count)


def stage_recipe(make_recipe: MakeRecipe, folder: Path, stage: str, mode: str = "full", **sections: Any) -> Recipe:
    """The stage on 24 records of its own, one in five held out; `sections` as in `make_recipe`."""
    train = tiny.write_jsonl(folder / f"{stage}.jsonl", records(stage, 0, 24))
    data = {"train": str(train), "columns": {}, **sections.pop("data", {})}
    return make_recipe(**{"stage": stage, "tuning": {"mode": mode}, **sections, "data": data})
