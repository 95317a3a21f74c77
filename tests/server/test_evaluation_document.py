"""What is told of single sites never tells of a silent one; and what is asked is checked before anybody is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core_training.foundation.errors import InputError
from core_training.runs.events import SitesEvaluated
from evaluation.federated.site_sums import Plan, SiteFigures
from server.evaluation_document import document_of, told_sites
from server.evaluation_requests import Request, folder_of
from strategies.messages import SumsOrder

NO_TABLE = np.zeros((0, 0), dtype=np.int64)
PLAN = Plan(("accuracy", "loss"), resamples=0)


def figures(items: int, right: int, loss: float) -> SiteFigures:
    sums = {"accuracy": np.array([right, items], float), "loss": np.array([loss * items, items], float)}
    nothing = {name: np.zeros((0, 2)) for name in PLAN.metrics}
    return SiteFigures(items, dict.fromkeys(PLAN.metrics, items), sums, nothing, NO_TABLE)


def test_where_one_site_alone_is_silent_the_smallest_other_one_is_too() -> None:
    own = {"a": figures(30, 10, 1.0), "b": figures(10, 5, 2.0), "c": figures(20, 5, 3.0)}
    assert told_sites(own, 3) == ["a", "b", "c"]
    assert told_sites(own, 4) == ["a", "c"]
    assert told_sites(own, 5) == ["a", "b", "c"]
    assert told_sites({"a": own["a"]}, 2) == []


def test_the_worst_site_is_the_one_with_the_highest_loss_and_the_lowest_accuracy() -> None:
    own = {"a": figures(30, 10, 1.0), "b": figures(10, 5, 2.0), "c": figures(20, 5, 3.0)}
    outcome = SitesEvaluated(data="ward", n=60, sites=list("abc"), missing={"d": "away"}, masked=False)
    request = Request(data="ward", metrics=list(PLAN.metrics))
    (result,) = document_of("run", request, PLAN, figures(60, 20, 2.0), outcome, own)["results"]
    between = result["between_sites"]["metrics"]
    assert between["loss"] == {"worst": {"site": "c", "value": 3.0}, "spread": 2.0}
    assert between["accuracy"] == {"worst": {"site": "c", "value": 0.25}, "spread": 0.25}
    assert result["groups"]["site"]["b"]["metrics"]["accuracy"]["value"] == 0.5
    assert result["missing"] == {"d": "away"}


@pytest.mark.parametrize("name", ["../ward", "a/b", "", ".hidden", "x" * 80])
def test_a_name_that_no_data_set_has_is_refused_before_a_file_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--on"):
        folder_of(tmp_path, name)


def test_a_question_has_one_key_whoever_is_asked_and_another_for_other_words() -> None:
    request = Request(data="ward", metrics=["loss"])
    orders: list[SumsOrder] = [request.order("run", "0" * 64, sites) for sites in (3, 5)]
    assert orders[0].key == orders[1].key == orders[0].model_copy(update={"masking": "{}"}).key
    assert orders[0].context("recipe") != orders[1].context("recipe"), "masks meet among those who see alike"
    others = [
        request.order("other", "0" * 64, 3),
        request.order("run", "1" * 64, 3),
        request.model_copy(update={"metrics": ["perplexity"]}).order("run", "0" * 64, 3),
        request.model_copy(update={"resamples": 1}).order("run", "0" * 64, 3),
    ]
    assert len({orders[0].key, *(order.key for order in others)}) == 5
