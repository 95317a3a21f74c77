"""The figures of a run's summary by their dotted names: `eval_loss`, `metrics.accuracy`, `sites.heart.eval_loss`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from core_training.foundation.errors import InputError
from core_training.runs.run_folder import SiteSummary, Summary
from experiments.documents import nearest

_WORDS = ("topology", "stage", "tuning", "status", "initial_digest", "state_digest", "curve")
"""Fields of a summary that are no numbers."""
_OPEN = {"metrics": "metrics.NAME", "seconds": "seconds.NAME", "privacy": "privacy.NAME", "sites": "sites.NAME.FIGURE"}
"""Fields whose own names depend on the run."""


def check_name(name: str, place: str) -> None:
    """Raise InputError for a figure that no summary has; which of `metrics` there are, a run's stage says."""
    first, *rest = name.split(".")
    if first in _OPEN:
        if not all(rest) or len(rest) < (2 if first == "sites" else 1):
            raise InputError(f"{place}: {name} is no figure; name one of them: {_OPEN[first]}")
        if first == "sites" and rest[-1] not in (known := [field.name for field in fields(SiteSummary)]):
            raise InputError(f"{place}: {name}: a site has no figure '{rest[-1]}'; {nearest(rest[-1], known)}")
        return
    known = [field.name for field in fields(Summary) if field.name not in (*_WORDS, *_OPEN)]
    if rest or first not in known:
        raise InputError(f"{place}: no summary has a figure '{name}'; {nearest(name, [*known, *_OPEN.values()])}")


def figures_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a summary by their dotted names; what does not apply, or is no finite number, is left out."""
    found: dict[str, float] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": number for name, number in figures_of(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[key] = float(value)
    return found


def figure(summary: Mapping[str, Any], name: str, place: str) -> float:
    """The figure of that name. Raises InputError, with those that there are, where the summary has none."""
    found = figures_of(summary)
    if name not in found:
        section = [known for known in found if known.startswith(name.split(".")[0])]
        raise InputError(f"{place}: this run's summary has no figure '{name}'; {nearest(name, section or found)}")
    return found[name]
