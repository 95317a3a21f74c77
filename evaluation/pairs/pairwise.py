"""Pairs of answers and what judges say of them: both orders into one outcome, wins, ties, position bias. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.figures.statistics import Array, holm, interval, mcnemar, mean
from evaluation.items import Item, Written


class Winner(StrEnum):
    """Which of two answers, in the order they were shown, a judge finds better."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"


@dataclass(frozen=True)
class Shown:
    """Two models' answers to an item in the order in which a judge sees them."""

    item: Item
    first: str
    second: str
    texts: tuple[str, str]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.item.id, self.first, self.second

    @property
    def turned(self) -> Shown:
        """The same the other way round."""
        return Shown(self.item, self.second, self.first, self.texts[::-1])


@dataclass(frozen=True)
class Look:
    """A judge's word on two answers in one order; `winner` None where there was none that could be read.

    `by` names the judge; `margin` says by how much the better one is better, where the judge measures that.
    """

    item: str
    first: str
    second: str
    by: str
    winner: Winner | None
    margin: float | None = None

    @property
    def vote(self) -> int:
        """+1 for the model whose name comes first by the alphabet, −1 for the other one, 0 for a tie."""
        if self.winner is None or self.winner is Winner.TIE:
            return 0
        return 1 if (self.winner is Winner.FIRST) == (self.first < self.second) else -1

    @property
    def pair(self) -> tuple[str, str, str]:
        """The item and the two models, whatever the order."""
        return (self.item, *sorted((self.first, self.second)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Outcome:
    """What came of two models' answers to an item: `share` is 1 where `model` won, 0.5 for a tie, 0 where it lost.

    None says that it was not judged. `margin` is 0 to 1 where judges vote, and a difference of scores where they score.
    """

    item: str
    model: str
    against: str
    share: float | None
    margin: float = 0.0
    identical: bool = False


def outcome(shown: Shown, looks: Sequence[Look], orders: int) -> Outcome:
    """The outcome of a pair from the looks at it. A judge needs both orders where `orders` is 2.

    A judge who says otherwise of the other order finds a tie. Several judges' majority decides, and a draw of theirs is
    a tie; the margin is the share of judges that the winner leads by.
    """
    if shown.texts[0] == shown.texts[1]:
        return Outcome(shown.item.id, shown.first, shown.second, 0.5, identical=True)
    votes, margins = [], []
    for own in _by_judge(looks).values():
        if len(own) < orders or any(look.winner is None for look in own):
            continue
        said = {look.vote for look in own}
        votes.append(said.pop() if len(said) == 1 else 0)
        margins += [look.margin for look in own if look.margin is not None]
    if not votes:
        return Outcome(shown.item.id, shown.first, shown.second, None)
    lead = sum(votes) / len(votes) * (1 if shown.first < shown.second else -1)
    margin = sum(margins) / len(margins) if margins else abs(lead)
    return Outcome(shown.item.id, shown.first, shown.second, (1 + float(np.sign(lead))) / 2, margin if lead else 0.0)


def _by_judge(looks: Iterable[Look]) -> dict[str, list[Look]]:
    found: dict[str, list[Look]] = {}
    for look in looks:
        found.setdefault(look.by, []).append(look)
    return found


def all_pairs(
    items: Sequence[Item], models: Sequence[str], written: Mapping[str, Mapping[tuple[str, int], Written]]
) -> list[Shown]:
    """Each two models on each item that both answered, in the models' order."""
    return [
        Shown(item, one, other, (written[one][item.id, 0].text, written[other][item.id, 0].text))
        for item in items
        for one, other in combinations(models, 2)
        if (item.id, 0) in written[one] and (item.id, 0) in written[other]
    ]


def wins_by_item(outcomes: Sequence[Outcome], models: Sequence[str]) -> Array:
    """Wins with ties as half, shape (items with a judged pair, models, models): […, i, j] is i over j."""
    places = {name: number for number, name in enumerate(models)}
    judged = [one for one in outcomes if one.share is not None]
    rows = {name: row for row, name in enumerate(dict.fromkeys(one.item for one in judged))}
    wins = np.zeros((len(rows), len(models), len(models)))
    for one in judged:
        assert one.share is not None
        row, ours, theirs = rows[one.item], places[one.model], places[one.against]
        wins[row, ours, theirs] += one.share
        wins[row, theirs, ours] += 1 - one.share
    return wins


def counts(outcomes: Sequence[Outcome], model: str) -> dict[str, int]:
    """How often a model won, lost, tied, and was not judged, against all others."""
    shares = [
        one.share if one.model == model or one.share is None else 1 - one.share
        for one in outcomes
        if model in (one.model, one.against)
    ]
    return {
        "wins": shares.count(1.0),
        "losses": shares.count(0.0),
        "ties": shares.count(0.5),
        "unjudged": shares.count(None),
    }


def position_bias(looks: Sequence[Look]) -> float | None:
    """How much more often the answer shown first won: of the looks with a winner, first's share minus second's.

    0 is none, 1 says that the first always won, −1 the second. None where no look has a winner.
    """
    first = sum(look.winner is Winner.FIRST for look in looks)
    second = sum(look.winner is Winner.SECOND for look in looks)
    return (first - second) / (first + second) if first + second else None


def pair_document(
    outcomes: Sequence[Outcome], model: str, against: str, tokens: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Two models beside each other: counts, the share of wins with its interval, p of the sign test, lengths."""
    own = [one for one in outcomes if (one.model, one.against) == (model, against)]
    told = counts(own, model)
    shares = [one.share for one in own if one.share is not None]
    found = interval(mean(shares, is_share=0.5 not in shares)) if shares else None
    won = [share == 1.0 for share in shares]
    lost = [share == 0.0 for share in shares]
    lengths = [tokens[model][one.item] - tokens[against][one.item] for one in own]
    return {
        "model": model,
        "against": against,
        **told,
        "share": found.value if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        # Of the pairs with a winner, each model wins by a coin's toss: McNemar's exact test.
        "p": mcnemar(won, lost) if shares else None,
        "length_difference": sum(lengths) / len(lengths) if lengths else None,
    }


def with_holm(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with p adjusted for how many there are."""
    known = [number for number, one in enumerate(pairs) if one["p"] is not None]
    adjusted = dict(zip(known, holm([pairs[number]["p"] for number in known]), strict=True))
    return [{**one, "p_holm": adjusted.get(number)} for number, one in enumerate(pairs)]


def winners_length(outcomes: Sequence[Outcome], tokens: Mapping[str, Mapping[str, int]]) -> dict[str, float | None]:
    """How many tokens longer the better answers are than the worse ones, and in what share of pairs they are longer.

    Pairs of equal length count half.
    """
    gaps = [
        (tokens[one.model][one.item] - tokens[one.against][one.item]) * (1 if one.share == 1.0 else -1)
        for one in outcomes
        if one.share in (0.0, 1.0)
    ]
    if not gaps:
        return {"winner_minus_loser": None, "longer_wins": None}
    return {
        "winner_minus_loser": sum(gaps) / len(gaps),
        "longer_wins": sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps),
    }
