"""The metrics by name: which of a model's answers each needs, and the sums that it is a function of. No torch.

A metric that is not built in is `regex:PATTERN` (the share of answers that match), or a function of the person's own,
`FILE.py:name` or `module:name`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from core_training.foundation.errors import InputError
from evaluation.figures import words
from evaluation.figures.statistics import Array, Sums, mean, ratio
from evaluation.items import Answers, Item, Scored, Written

BINS = 10
"""Bins of confidence, of equal width (Guo et al. 2017)."""


class Part(StrEnum):
    """What a metric needs a model to do."""

    LOSS = "loss"
    CHOICE = "choice"
    ANSWER = "answer"
    RUBRIC = "rubric"


Figure = tuple[list[str], Sums]
"""The identifiers of the items that count, and the sums over them."""


@dataclass(frozen=True)
class Metric:
    """A metric: `of` gives its sums; `higher_is_better` is None where neither end is the better one."""

    name: str
    part: Part
    of: Callable[[Sequence[Item], Answers], Figure]
    higher_is_better: bool | None = True


def _loss(items: Sequence[Item], answers: Answers) -> Figure:
    found = [answers.measured[item.id] for item in items if item.id in answers.measured]
    return [one.id for one in found], ratio([one.loss_sum for one in found], [one.tokens for one in found])


def _perplexity(items: Sequence[Item], answers: Answers) -> Figure:
    ids, sums = _loss(items, answers)
    return ids, Sums(sums.values, lambda total: np.exp(sums.of(total)))


def _perplexity_per_item(items: Sequence[Item], answers: Answers) -> Figure:
    """exp of the mean over items of an answer's whole loss, which lm-evaluation-harness calls perplexity."""
    found = [answers.measured[item.id] for item in items if item.id in answers.measured]
    sums = mean([one.loss_sum for one in found])
    return [one.id for one in found], Sums(sums.values, lambda total: np.exp(sums.of(total)))


def _token_accuracy(items: Sequence[Item], answers: Answers) -> Figure:
    found = [answers.measured[item.id] for item in items if item.id in answers.measured]
    return [one.id for one in found], ratio([one.correct for one in found], [one.tokens for one in found])


def scores(item: Item, scored: Scored, by: str = "") -> list[float]:
    """What the choices are compared by: their log-probability, or that for each `token` or `character` of theirs."""
    if by == "token":
        return [logp / tokens for logp, tokens in zip(scored.logps, scored.tokens, strict=True)]
    if by == "character":
        return [logp / max(1, len(choice)) for logp, choice in zip(scored.logps, item.choices, strict=True)]
    return list(scored.logps)


def chosen(item: Item, scored: Scored, by: str = "") -> int:
    """The number of the likeliest choice; of several that tie, the first."""
    values = scores(item, scored, by)
    return values.index(max(values))


def _with_choices(items: Sequence[Item], answers: Answers) -> list[tuple[Item, Scored]]:
    return [(item, answers.scored[item.id]) for item in items if item.gold is not None and item.id in answers.scored]


def _accuracy(by: str) -> Callable[[Sequence[Item], Answers], Figure]:
    def of(items: Sequence[Item], answers: Answers) -> Figure:
        pairs = _with_choices(items, answers)
        right = [float(chosen(item, scored, by) == item.gold) for item, scored in pairs]
        return [item.id for item, _ in pairs], mean(right, is_share=True)

    return of


def _ties(items: Sequence[Item], answers: Answers) -> Figure:
    pairs = _with_choices(items, answers)
    tied = [float(scored.logps.count(max(scored.logps)) > 1) for _, scored in pairs]
    return [item.id for item, _ in pairs], mean(tied, is_share=True)


def confidence(scored: Scored) -> float:
    """The probability of the likeliest choice among the choices."""
    logps = np.array(scored.logps)
    return float(1 / np.exp(logps - logps.max()).sum())


def bins_of(pairs: Sequence[tuple[Item, Scored]]) -> Array:
    """For each item, its number, confidence and correctness in the bin that it falls into: (items, 3 · BINS)."""
    values = np.zeros((len(pairs), 3, BINS))
    for row, (item, scored) in enumerate(pairs):
        sure = confidence(scored)
        values[row, :, min(BINS - 1, int(sure * BINS))] = (1.0, sure, float(chosen(item, scored) == item.gold))
    return values.reshape(len(pairs), 3 * BINS)


def _expected_calibration_error(total: Array) -> Array:
    """Σ over bins of |confidence − accuracy|, weighed by the bins' share of items (Naeini et al. 2015)."""
    parts = total.reshape(*total.shape[:-1], 3, BINS)
    gaps = np.abs(parts[..., 1, :] - parts[..., 2, :]).sum(axis=-1)
    return np.asarray(gaps / parts[..., 0, :].sum(axis=-1))


def _ece(items: Sequence[Item], answers: Answers) -> Figure:
    pairs = _with_choices(items, answers)
    # Chance in the bins is a gap as well: it is too high, and higher yet in resamples, whose intervals miss the truth.
    sums = Sums(bins_of(pairs), _expected_calibration_error, has_interval=False)
    return [item.id for item, _ in pairs], sums


def confusion(items: Sequence[Item], answers: Answers) -> tuple[list[str], list[list[int]]]:
    """The labels, and for each right one (rows) how often each was chosen (columns)."""
    pairs = _with_choices(items, answers)
    labels = list(dict.fromkeys(label for item, _ in pairs for label in item.labels))
    labels = sorted(labels) if all(len(label) == 1 for label in labels) else labels
    counts = [[0] * len(labels) for _ in labels]
    for item, scored in pairs:
        assert item.gold is not None
        counts[labels.index(item.labels[item.gold])][labels.index(item.labels[chosen(item, scored)])] += 1
    return labels, counts


def macro_f1(items: Sequence[Item], answers: Answers, among: Sequence[str] = ()) -> Figure:
    """F1 of each label alike; a label that is neither right nor chosen anywhere counts for nothing.

    The labels are those of the items, or those `among` which all are. Raises InputError for an item with another one.
    """
    pairs = _with_choices(items, answers)
    labels = list(among or dict.fromkeys(label for item, _ in pairs for label in item.labels))
    if among and any(label not in labels for item, _ in pairs for label in item.labels):
        said = f"labels: the choices here have others than {', '.join(among)}"
        raise InputError(said, public=said)
    values = np.zeros((len(pairs), 2, len(labels)))  # twice right, and right plus chosen
    for row, (item, scored) in enumerate(pairs):
        assert item.gold is not None
        right, given = (labels.index(item.labels[n]) for n in (item.gold, chosen(item, scored)))
        values[row, 0, right] += 2.0 * (right == given)
        values[row, 1, right] += 1
        values[row, 1, given] += 1

    def of(total: Array) -> Array:
        parts = total.reshape(*total.shape[:-1], 2, len(labels))
        seen = parts[..., 1, :] > 0
        f1 = np.where(seen, parts[..., 0, :] / np.where(seen, parts[..., 1, :], 1), 0)
        return np.asarray(f1.sum(axis=-1) / seen.sum(axis=-1))

    return [item.id for item, _ in pairs], Sums(values.reshape(len(pairs), 2 * len(labels)), of)


def _by_item(items: Sequence[Item], values: Mapping[tuple[str, int], float], *, is_share: bool) -> Figure:
    """The mean over items of the mean over an item's samples."""
    of_item: dict[str, list[float]] = {}
    for (identifier, _), value in values.items():
        of_item.setdefault(identifier, []).append(value)
    ids = [item.id for item in items if item.id in of_item]
    means = [sum(of_item[identifier]) / len(of_item[identifier]) for identifier in ids]
    return ids, mean(means, is_share=is_share and all(value in (0.0, 1.0) for value in means))


def _of_answers(
    figure: Callable[[Item, Written], float], *, is_share: bool = False, referenced: bool = False
) -> Callable[[Sequence[Item], Answers], Figure]:
    def of(items: Sequence[Item], answers: Answers) -> Figure:
        known = {item.id: item for item in items if item.references or not referenced}
        values = {key: figure(known[key[0]], one) for key, one in answers.written.items() if key[0] in known}
        return _by_item(items, values, is_share=is_share)

    return of


def _against(figure: Callable[[str, str], float], *, is_share: bool) -> Callable[[Sequence[Item], Answers], Figure]:
    return _of_answers(
        lambda item, one: words.best(figure, one.text, item.references), is_share=is_share, referenced=True
    )


def _given(name: str) -> Callable[[Sequence[Item], Answers], Figure]:
    """A figure that a judge or a function gave to each answer."""

    def of(items: Sequence[Item], answers: Answers) -> Figure:
        known = {item.id for item in items}
        values = {key: value for key, value in answers.values.get(name, {}).items() if key[0] in known}
        return _by_item(items, values, is_share=all(value in (0.0, 1.0) for value in values.values()))

    return of


def rubric_points(item: Item, met: Sequence[bool | None]) -> float | None:
    """Points reached over all positive points (HealthBench); None where a criterion has no verdict."""
    if any(one is None for one in met):
        return None
    possible = sum(criterion.points for criterion in item.rubric if criterion.points > 0)
    return sum(criterion.points for criterion, one in zip(item.rubric, met, strict=True) if one) / possible


def _rubric(items: Sequence[Item], answers: Answers) -> Figure:
    known = {item.id: item for item in items if item.rubric}
    points = {
        key: rubric_points(known[key[0]], judged.met) for key, judged in answers.judged.items() if key[0] in known
    }
    ids, sums = _by_item(items, {key: value for key, value in points.items() if value is not None}, is_share=False)
    return ids, Sums(sums.values, lambda total: np.clip(sums.of(total), 0.0, 1.0))


_ANSWER = Part.ANSWER
METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", Part.LOSS, _loss, higher_is_better=False),
        Metric("perplexity", Part.LOSS, _perplexity, higher_is_better=False),
        Metric("perplexity_per_item", Part.LOSS, _perplexity_per_item, higher_is_better=False),
        Metric("token_accuracy", Part.LOSS, _token_accuracy),
        Metric("accuracy", Part.CHOICE, _accuracy("")),
        Metric("accuracy_per_token", Part.CHOICE, _accuracy("token")),
        Metric("accuracy_per_character", Part.CHOICE, _accuracy("character")),
        Metric("macro_f1", Part.CHOICE, macro_f1),
        Metric("ece", Part.CHOICE, _ece, higher_is_better=False),
        Metric("ties", Part.CHOICE, _ties, higher_is_better=None),
        Metric("exact_match", _ANSWER, _against(words.exact_match, is_share=True)),
        Metric("quasi_exact_match", _ANSWER, _against(words.quasi_exact_match, is_share=True)),
        Metric("token_f1", _ANSWER, _against(words.token_f1, is_share=False)),
        Metric("rouge_l", _ANSWER, _against(words.rouge_l, is_share=False)),
        Metric("number_match", _ANSWER, _against(words.number_match, is_share=True)),
        Metric("refusal", _ANSWER, _of_answers(lambda _, one: words.refuses(one.text), is_share=True), None),
        Metric("ended", _ANSWER, _of_answers(lambda _, one: float(one.ended), is_share=True)),
        Metric("answer_tokens", _ANSWER, _of_answers(lambda _, one: float(one.tokens)), None),
        Metric("answer_words", _ANSWER, _of_answers(lambda _, one: float(len(one.text.split()))), None),
        Metric("rubric", Part.RUBRIC, _rubric),
    )
}
WITHOUT_INTERVALS = ("ece",)
REWARD = "reward"
"""What a reward model gives; it is there where one is named."""

OF_CHOICES = ("accuracy", "accuracy_per_token", "accuracy_per_character", "macro_f1", "ece", "ties")
OF_ANSWERS = (*("exact_match", "quasi_exact_match", "token_f1", "rouge_l", "refusal", "ended", "answer_tokens"),)
OF_LOSS = ("loss", "perplexity", "token_accuracy")


def metric(name: str) -> Metric:
    """The metric of a name. Raises InputError for one that there is not."""
    if name in METRICS:
        return METRICS[name]
    if name == REWARD:
        return Metric(name, _ANSWER, _given(name))
    kind, colon, rest = name.partition(":")
    if kind == "regex" and colon and rest:
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise InputError(f"metrics: '{name}': {rest!r} is no regular expression: {error}") from None
        found = _of_answers(lambda _, one: float(pattern.search(one.text) is not None), is_share=True)
        return Metric(name, _ANSWER, found)
    if colon and rest.isidentifier():
        return Metric(name, _ANSWER, _given(name))
    close = difflib.get_close_matches(name, METRICS, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise InputError(
        f"metrics: there is no metric '{name}'{meant} There are {', '.join(METRICS)}, regex:PATTERN, and a function of "
        "your own as FILE.py:name or module:name"
    )


def is_own(name: str) -> bool:
    """Whether a metric is a function of the person's own."""
    return name not in METRICS and name != REWARD and not name.startswith("regex:")
