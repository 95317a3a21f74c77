"""A provider for promptfoo: the answers that were kept, or those of a model that this process loads.

It lies beside the promptfooconfig.yaml that names it; cases.jsonl there has each case's question and kept answers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@functools.cache
def cases() -> dict[str, dict[str, Any]]:
    """The cases by their names."""
    with (FOLDER / "cases.jsonl").open(encoding="utf-8") as lines:
        return {case["case"]: case for case in map(json.loads, lines)}


@functools.cache
def model(place: str, base: str | None, site: str | None, max_tokens: int) -> Any:
    """A run's, an exported folder's or a base model, which answers as in `fedloom chat` at temperature 0."""
    from core_training.models.conversation import Conversation, Sampling
    from evaluation.answers.subjects import load_subject

    loaded = load_subject(place, Path(base) if base else None, site).base
    return lambda prompt: Conversation(loaded, Sampling(max_tokens)).reply(prompt).text


def call_api(prompt: str, options: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """What promptfoo calls for each case: `{"output": …}`, or `{"error": …}` where nothing answers."""
    config, case = options["config"], cases()[context["vars"]["case"]]
    if "model" in config:
        asked = model(*(config[name] for name in ("model", "base", "site", "max_tokens")))
        return {"output": asked(case["prompt"])}
    answer = case["answers"].get(config["answers"])
    return {"error": f"{config['answers']} gave no answer"} if answer is None else {"output": answer}
