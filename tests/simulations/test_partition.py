"""Dividing one data set among sites."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from simulations.partition import divide
from simulations.sites import SitePool, simulated_sites
from strategies.messages import SITE_NAME
from tests import tiny

LABELS = ["treatment", "symptoms", "causes", "outlook"]


def records(count: int) -> list[Record]:
    return [Record({"text": f"{i}", "kind": LABELS[i % 4]}, Path("all.jsonl"), i + 1) for i in range(count)]


def recipe(seed: int = 0, **simulation: Any) -> Recipe:
    document = f"{{model: {{name_or_path: m}}, stage: pretrain, training: {{seed: {seed}}}, simulation: {simulation}}}"
    return parse_recipe(document.replace("None", "null"))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12),
    extra=st.integers(0, 80),
    kind=st.sampled_from(["iid", "dirichlet", "size_skew"]),
    alpha=st.sampled_from([0.05, 0.5, 100.0]),
    seed=st.integers(0, 3),
)
def test_every_record_goes_to_exactly_one_site_and_no_site_is_empty(
    count: int, extra: int, kind: str, alpha: float, seed: int
) -> None:
    everything = records(count + extra)
    wanted = recipe(seed, partition=kind, count=count, alpha=alpha, by="kind")
    sites = divide(everything, wanted)
    assert len(sites) == count
    assert all(sites.values())
    assert sorted(r.line for site in sites.values() for r in site) == [r.line for r in everything]
    assert divide(everything, wanted) == sites


def test_iid_sites_are_of_one_size() -> None:
    sizes = [len(site) for site in divide(records(103), recipe(partition="iid", count=10)).values()]
    assert max(sizes) - min(sizes) <= 1


def test_small_alpha_concentrates_labels_and_large_alpha_spreads_them() -> None:
    def share_of_commonest_label(alpha: float) -> float:
        sites = divide(records(4000), recipe(partition="dirichlet", count=8, alpha=alpha, by="kind")).values()
        return float(np.mean([max(Counter(r.fields["kind"] for r in s).values()) / len(s) for s in sites]))

    assert share_of_commonest_label(0.05) > 0.7
    assert share_of_commonest_label(1000.0) < 0.3


def test_size_skew_makes_some_sites_much_larger() -> None:
    sizes = [len(s) for s in divide(records(1000), recipe(partition="size_skew", count=8, alpha=0.3)).values()]
    assert sum(sorted(sizes)[-2:]) > sum(sizes) / 2


def test_natural_sites_are_the_values_of_a_column() -> None:
    sites = divide(records(9), recipe(partition="natural", by="kind"))
    assert {name: len(site) for name, site in sites.items()} == {
        "treatment": 3,
        "symptoms": 2,
        "causes": 2,
        "outlook": 2,
    }


def test_a_column_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"all.jsonl, line 1 has no column 'ward'; it has text, kind"):
        divide(records(3), recipe(partition="natural", by="ward"))


def test_more_sites_than_records_is_refused() -> None:
    with pytest.raises(InputError, match="7 sites are more than the 3 records"):
        divide(records(3), recipe(partition="iid", count=7))


def test_two_sites_of_one_name_are_refused(
    make_recipe: Callable[..., Recipe], site_files: list[Path], tmp_path: Path
) -> None:
    namesake = tmp_path / site_files[0].name
    namesake.write_bytes(site_files[1].read_bytes())
    with pytest.raises(InputError, match="two sites are called 'site0'"):
        simulated_sites(make_recipe(simulation={"sites": [str(site_files[0]), str(namesake)]}))


def test_a_recipe_without_sites_says_what_to_give(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(InputError, match=r"simulation.sites.*simulation.partition"):
        simulated_sites(make_recipe())


def test_natural_sites_are_kept_apart_whatever_letters_their_values_have(caplog: pytest.LogCaptureFixture) -> None:
    values = ["北京", "上海", "Ward A/B", "Ward A-B", "Ward-A-B", "plain"]
    made = [Record({"text": f"{value} {i}", "ward": value}, Path("all.jsonl"), i) for value in values for i in range(2)]
    sites = divide(made, recipe(partition="natural", by="ward"))
    assert [len(site) for site in sites.values()] == [2] * 6
    assert {"plain", "Ward-A-B"} < set(sites)
    assert all(re.match(SITE_NAME, name) for name in sites)
    assert "the site of '北京' is called site-" in caplog.text


def test_sites_that_a_partition_left_with_nothing_to_train_take_no_part(
    make_recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.questions(0, 24))
    settings = {
        "data": {"train": str(data), "eval_fraction": 0.5},
        "topology": {"kind": "federated", "rounds": 1, "local_steps": 1},
        "simulation": {"partition": "iid", "count": 12},
    }
    names = SitePool(make_recipe(**settings), tmp_path / "sites").names
    assert 0 < len(names) < 12
    assert f"{12 - len(names)} of 12 sites take no part" in caplog.text
    settings["topology"] = {**settings["topology"], "minimum_sites": 12}
    with pytest.raises(InputError, match="are held out for evaluation"):
        SitePool(make_recipe(**settings), tmp_path / "sites")
