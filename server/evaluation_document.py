"""The document of a federated evaluation: figures of all sites together, and of single ones as far as they are told.

Pure. What is told of single sites must not tell of those that are silent: see `told_sites`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from core_training.runs.events import SitesEvaluated
from evaluation.federated.site_sums import Plan, SiteFigures, is_worse, tables, told, value_of
from server.evaluation_requests import Request


def told_sites(own: Mapping[str, SiteFigures], sites: int) -> list[str]:
    """Those whose own figures are told, of the `sites` in the sum.

    Where one site alone is silent, its figures would be the sum's without all others': the smallest that would be told
    is silent, too.
    """
    names = sorted(own, key=lambda site: (own[site].items, site))
    return sorted(names[1:] if len(names) == sites - 1 else names)


def document_of(
    model: str,
    request: Request,
    plan: Plan,
    figures: SiteFigures,
    outcome: SitesEvaluated,
    own: Mapping[str, SiteFigures],
) -> dict[str, Any]:
    """The document of `results.json`: of `evaluate --json`'s form, with the sites beside it."""
    names = told_sites(own, len(outcome.sites))
    result: dict[str, Any] = {
        "model": model,
        "task": request.data,
        "n": figures.items,
        "metrics": told(plan, figures),
        "groups": {"site": {site: _of_site(plan, own[site]) for site in names}} if names else {},
        **tables(plan, figures),
        "masked": outcome.masked,
        "sites": list(outcome.sites),
        "missing": dict(outcome.missing),
    }
    if figures.gains:
        mean_gain = {name: gain / len(outcome.sites) for name, gain in figures.gains.items()}
        result["own_models"] = {"mean_gain": mean_gain}
    if len(names) > 1:
        result["between_sites"] = {
            "sites": len(names),
            "metrics": {name: _between(plan, name, {site: own[site] for site in names}) for name in plan.metrics},
        }
    return {"results": [result], "request": request.model_dump()}


def _of_site(plan: Plan, figures: SiteFigures) -> dict[str, Any]:
    group: dict[str, Any] = {"n": figures.items, "metrics": told(plan, figures)}
    if figures.gains:
        group["own_model_gain"] = dict(figures.gains)
    return group


def _between(plan: Plan, name: str, own: Mapping[str, SiteFigures]) -> dict[str, Any]:
    """The worst site, and how far the best is from it, of those that are told."""
    values = {site: value_of(plan, figures, name) for site, figures in own.items()}
    values = {site: value for site, value in values.items() if math.isfinite(value)}
    if not values:
        return {"worst": None, "spread": None}
    worse = is_worse(name)
    worst = next(iter(sorted(values)))
    for site in sorted(values):
        worst = site if worse(values[site], values[worst]) else worst
    return {
        "worst": {"site": worst, "value": values[worst]},
        "spread": max(values.values()) - min(values.values()),
    }
