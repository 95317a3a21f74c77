"""Sums of a federated evaluation: whole numbers that add up to one judge's figures, and intervals that cover."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from evaluation.federated.site_sums import (
    OFFERED,
    RESAMPLED_STEP,
    STEP,
    Plan,
    SiteFigures,
    figures_of,
    from_integers,
    tables,
    to_integers,
    told,
)
from evaluation.figures.statistics import interval, ratio
from evaluation.items import Answers, Item, Measured, Scored, Written

LABELS = ("yes", "no", "maybe")


def site(seed: int, count: int) -> tuple[list[Item], Answers]:
    """Items of a site with choices and references, and what a model gave on them."""
    random, items, answers = np.random.default_rng(seed), [], Answers()
    for number in range(count):
        name = f"{seed}-{number}"
        items.append(
            Item(
                name,
                Record({}, Path("x.jsonl"), number),
                str(seed),
                choices=LABELS,
                labels=LABELS,
                gold=int(random.integers(3)),
                references=("a b c",),
            )
        )
        logps = tuple(random.normal(-3, 1, 3).tolist())
        answers.scored[name] = Scored(name, logps, (1, 2, 1))
        text = " ".join(random.choice(list("abcde"), 3).tolist())
        answers.written[name, 0] = Written(name, 0, text, 3, bool(random.integers(2)))
        tokens = int(random.integers(1, 9))
        answers.measured[name] = Measured(name, float(random.gamma(2.0, tokens)), tokens, int(random.integers(tokens)))
    return items, answers


def together(*parts: tuple[list[Item], Answers]) -> tuple[list[Item], Answers]:
    whole = Answers()
    for _, answers in parts:
        whole.scored |= answers.scored
        whole.written |= answers.written
        whole.measured |= answers.measured
    return [item for items, _ in parts for item in items], whole


def test_the_sum_of_the_sites_whole_numbers_is_what_one_judge_of_all_finds() -> None:
    plan = Plan(OFFERED, LABELS, resamples=3)
    sites = [site(seed, 5 + 7 * seed) for seed in range(6)]
    numbers = [to_integers(plan, figures_of(plan, *one, seed=b"%d" % n)) for n, one in enumerate(sites)]
    assert {len(own) for own in numbers} == {plan.length}
    summed = from_integers(plan, [sum(column) for column in zip(*numbers, strict=True)])
    whole = figures_of(plan, *together(*sites), seed=b"")
    assert summed.items == whole.items
    assert dict(summed.counted) == dict(whole.counted)
    assert summed.confusion.tolist() == whole.confusion.tolist()
    for name in OFFERED:
        counts = np.equal(np.mod(whole.sums[name], 1), 0)
        assert summed.sums[name][counts].tolist() == whole.sums[name][counts].tolist(), name
        assert np.abs(summed.sums[name] - whole.sums[name]).max() <= len(sites) * STEP / 2
        mine, theirs = told(plan, summed)[name]["value"], told(plan, whole)[name]["value"]
        assert mine == pytest.approx(theirs, abs=1e-6, rel=1e-6), name
    assert tables(plan, summed)["confusion"] == tables(plan, whole)["confusion"]
    assert [one["n"] for one in tables(plan, summed)["calibration"]] == [
        one["n"] for one in tables(plan, whole)["calibration"]
    ]


def test_a_site_draws_its_resamples_of_its_seed_alone_and_counts_in_them_are_whole() -> None:
    plan, own = Plan(("loss", "accuracy"), resamples=40), site(3, 30)
    first, again, other = (figures_of(plan, *own, seed=seed).resampled["accuracy"] for seed in (b"a", b"a", b"b"))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert first[:, 1].mean() == pytest.approx(30, abs=3 * math.sqrt(30 / 40))
    read = from_integers(plan, to_integers(plan, figures_of(plan, *own, seed=b"a")))
    assert read.resampled["accuracy"].tolist() == first.tolist()
    exact = figures_of(plan, *own, seed=b"a").resampled["loss"]
    assert np.abs(read.resampled["loss"] - exact).max() <= RESAMPLED_STEP / 2


def test_intervals_of_summed_poisson_resamples_cover_as_those_of_one_judge_do() -> None:
    plan, random = Plan(("loss",), resamples=500), np.random.default_rng(1)
    covered = np.zeros(2)  # federated, pooled
    trials, truth = 500, 2.0
    for trial in range(trials):
        numbers, losses, tokens = [], [], []
        for place, count in enumerate((12, 20, 40)):
            answers, items = Answers(), []
            for number in range(count):
                name = f"{place}-{number}"
                items.append(Item(name, Record({}, Path("x.jsonl"), number), "s"))
                size = int(random.integers(1, 20))
                loss = float(random.gamma(2 * truth * size, 0.5))
                answers.measured[name] = Measured(name, loss, size, 0)
                losses.append(loss)
                tokens.append(size)
            numbers.append(to_integers(plan, figures_of(plan, items, answers, seed=b"%d %d" % (trial, place))))
        federated = told(plan, from_integers(plan, [sum(column) for column in zip(*numbers, strict=True)]))["loss"]
        pooled = interval(ratio(losses, tokens), resamples=500, seed=trial)
        covered += (federated["low"] <= truth <= federated["high"], pooled.low <= truth <= pooled.high)
    assert covered / trials == pytest.approx([0.95, 0.95], abs=0.02)
    assert abs(covered[0] - covered[1]) / trials < 0.01


def test_what_does_not_fit_the_plan_is_refused_in_words() -> None:
    items, answers = site(0, 4)
    with pytest.raises(InputError, match="labels: the choices here have others than yes, no"):
        figures_of(Plan(("accuracy",), ("yes", "no")), items, answers, seed=b"")
    with pytest.raises(InputError, match="nothing here is what loss is of"):
        figures_of(Plan(("loss",)), items, Answers(), seed=b"")
    answers.measured["0-0"] = Measured("0-0", math.inf, 1, 0)
    with pytest.raises(InputError, match="no finite number"):
        to_integers(plan := Plan(("loss",), resamples=0), figures_of(plan, items, answers, seed=b""))


def test_a_site_with_a_model_of_its_own_adds_how_far_it_is_above_the_common_one() -> None:
    plan, items = Plan(("accuracy",), resamples=0, own=True), site(1, 20)[0]
    common, own = site(1, 20)[1], site(1, 20)[1]
    for item in items[:6]:
        own.scored[item.id] = Scored(item.id, tuple(0.0 if n == item.gold else -9.0 for n in range(3)), (1, 1, 1))
    with_own = figures_of(plan, items, common, b"", own)
    gain = (
        told(plan, figures_of(plan, items, own, b""))["accuracy"]["value"] - told(plan, with_own)["accuracy"]["value"]
    )
    without = figures_of(plan, *site(2, 10), seed=b"")
    assert without.gains == {"accuracy": 0.0}
    numbers = [to_integers(plan, one) for one in (with_own, with_own, without)]
    summed: SiteFigures = from_integers(plan, [sum(column) for column in zip(*numbers, strict=True)])
    assert summed.gains["accuracy"] == pytest.approx(2 * gain, abs=1e-5)
