"""A check for promptfoo: a function of the person's own, called as `fedloom evaluate` calls it, with lists of one.

It lies beside cases.jsonl, which has each case's question and what was expected. It imports nothing heavy: promptfoo
starts a process for each answer.
"""

from __future__ import annotations

import functools
import inspect
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@functools.cache
def case_of(name: str) -> dict[str, Any]:
    """The case of a name."""
    with (FOLDER / "cases.jsonl").open(encoding="utf-8") as lines:
        return next(case for case in map(json.loads, lines) if case["case"] == name)


def called(function: Callable[..., Any], prompt: str, answer: str, expected: str | None) -> float:
    """What a function of (prompts, completions), and of `expected` where it takes that, gives to one answer."""
    parameters = inspect.signature(function).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    given = {"prompts": [prompt], "completions": [answer]}
    more = {"expected": [expected]} if takes_all or "expected" in parameters else {}
    own = {name: values for name, values in given.items() if name in parameters}
    found = function(**own, **more) if own else function(*given.values(), **more)
    return 0.0 if found[0] is None else float(found[0])


def get_assert(output: str, context: dict[str, Any]) -> dict[str, Any]:
    """What promptfoo calls for each answer; the assertion's `config` names file, function and threshold."""
    config, case = context["config"], case_of(context["vars"]["case"])
    function = runpy.run_path(config["file"])[config["function"]]
    value = called(function, case["prompt"], output, case["expected"])
    passed = value >= config["threshold"]
    return {"pass": passed, "score": value, "reason": f"{config['function']} gave {value:g}"}
