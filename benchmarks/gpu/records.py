"""Made-up records of each kind, whose lengths differ as people's do, so that padding costs what it costs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import Shape

Message = dict[str, str]

_LETTERS = "abcdefghijklmnopqrstuvwxyz     "


def write_records(stage: str, shape: Shape, folder: Path) -> Path:
    """Write the records of a stage for a shape's work; the same ones each time."""
    draw = random.Random(0)
    kind = _KINDS[stage]
    count = {"pair": shape.records // 2, "prompt": shape.batch_size}.get(kind, shape.records)
    path = folder / f"{kind}-{shape.width}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(_MADE[kind](draw, shape)) + "\n" for _ in range(count)), encoding="utf-8")
    return path


def _conversation(draw: random.Random, shape: Shape) -> dict[str, Any]:
    return {"prompt": _asked(draw, shape), "completion": _answered(draw, shape)}


def _pair(draw: random.Random, shape: Shape) -> dict[str, Any]:
    answers = {name: _answered(draw, shape) for name in ("chosen", "rejected")}
    return {"prompt": _asked(draw, shape), **answers}


def _marked(draw: random.Random, shape: Shape) -> dict[str, Any]:
    return {**_conversation(draw, shape), "label": draw.random() < 0.5}


def _prompt(draw: random.Random, shape: Shape) -> dict[str, Any]:
    return {"prompt": _asked(draw, shape)}


def _text(draw: random.Random, shape: Shape) -> dict[str, Any]:
    return {"text": _letters(draw, shape, 0.5)}


_KINDS = {
    **{"pretrain": "text", "sft": "conversation", "kto": "marked"},
    **dict.fromkeys(("reward", "dpo", "orpo", "simpo"), "pair"),
    **dict.fromkeys(("ppo", "rloo", "grpo"), "prompt"),
}
_MADE: dict[str, Callable[[random.Random, Shape], dict[str, Any]]] = {
    "text": _text,
    "conversation": _conversation,
    "pair": _pair,
    "marked": _marked,
    "prompt": _prompt,
}


def _asked(draw: random.Random, shape: Shape) -> list[Message]:
    return [{"role": "user", "content": _letters(draw, shape, 0.1)}]


def _answered(draw: random.Random, shape: Shape) -> list[Message]:
    return [{"role": "assistant", "content": _letters(draw, shape, 0.35)}]


def _letters(draw: random.Random, shape: Shape, share: float) -> str:
    """Letters, log-normally many around a share of the longest row."""
    count = int(draw.lognormvariate(math.log(share * shape.max_length), 0.6))
    return "".join(draw.choices(_LETTERS, k=min(max(count, 4), shape.max_length)))
