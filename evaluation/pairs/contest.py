"""A comparison carried out: models answer the same prompts, judges look at each pair in both orders, all is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from core_training.foundation.errors import InputError
from evaluation.answers.judging import function_digest
from evaluation.answers.subjects import load_subject
from evaluation.figures.metrics import REWARD
from evaluation.figures.results import Result
from evaluation.items import Task, Written
from evaluation.pairs.agreement import agreement
from evaluation.pairs.bradley_terry import ratings
from evaluation.pairs.pair_judges import (
    EXPECTED,
    PEOPLE,
    ExpectedJudge,
    FunctionJudge,
    JudgeName,
    ModelJudge,
    PairJudge,
    ScoreJudge,
    load_judge,
    takes_pairs,
)
from evaluation.pairs.pairwise import (
    Look,
    Outcome,
    Shown,
    all_pairs,
    counts,
    outcome,
    pair_document,
    position_bias,
    winners_length,
    wins_by_item,
    with_holm,
)
from evaluation.pairs.verdicts import KeptLooks, preferences, write_preferences
from evaluation.running import OnProgress, Settings, evaluate

_ALWAYS = ("ended", "answer_tokens")


@dataclass
class Contest:
    """Models' answers side by side; `pairs` are in the models' order, and judged in both.

    `results` are the models' own figures on the task, one each.
    """

    models: tuple[str, ...]
    task: Task
    judge: JudgeName
    folder: Path
    pairs: list[Shown]
    results: list[Result]
    kept: KeptLooks
    notes: list[str] = field(default_factory=list)
    orders: int = 2
    """How many orders a judge must have seen of a pair: 1 where several people see one each."""
    digest: str = PEOPLE
    """Of the judge: looks are kept under it."""
    seed: int = 0

    @property
    def differing(self) -> list[Shown]:
        """The pairs whose answers are not the same, which are all that a judge sees."""
        return [one for one in self.pairs if one.texts[0] != one.texts[1]]

    def looks(self) -> list[Look]:
        """All looks of the judge at today's answers, in both orders."""
        both = (order for one in self.differing for order in (one, one.turned))
        return [look for shown in both for look in self.kept.of(shown, self.digest).values()]

    def outcomes(self) -> list[tuple[Shown, Outcome]]:
        """What came of each pair."""
        by_pair: dict[tuple[str, str, str], list[Look]] = {}
        for look in self.looks():
            by_pair.setdefault(look.pair, []).append(look)
        asked = ((one, Look(*one.key, "", None).pair) for one in self.pairs)
        return [(one, outcome(one, by_pair.get(pair, []), self.orders)) for one, pair in asked]

    def judge_all(self, judge: PairJudge, on_progress: OnProgress = lambda *_: None) -> None:
        """Have a judge look at all pairs in both orders; what was looked at before is not again."""
        self.digest = judge.digest
        both = [order for one in self.differing for order in (one, one.turned)]
        left = [one for one in both if not self.kept.of(one, judge.digest)]
        done = len(both) - len(left)
        for batch in judge.looks(left):
            self.kept.add_all(batch, judge.digest)
            done += len(batch)
            on_progress(f"{self.task.name}: verdicts of {Path(judge.name).name}", done, len(both))


def load_contest(
    models: Sequence[str],
    task: Task,
    judge: JudgeName,
    settings: Settings,
    folder: Path,
    on_progress: OnProgress = lambda *_: None,
) -> Contest:
    """Have each model answer each prompt; answers that `folder` has are not asked for again.

    Raises InputError for models that are one, prompts that are none, and a judge that cannot be had.
    """
    check_models(models)
    _check_prompts(task)
    if judge.kind == EXPECTED and not any(item.references for item in task.items):
        raise InputError(
            f"{task.name}: its prompts come without expected answers to judge by; name a judge with --judge: "
            "reward:RUN, model:RUN|MODEL, FILE.py:function or people"
        )
    scorer = _scorer(judge)
    if judge.kind == REWARD:
        settings = replace(settings, reward=Path(judge.target))
    metrics = (*_ALWAYS, *([scorer] if scorer is not None else []))
    asked = replace(task, metrics=metrics)
    try:
        found = evaluate(models, [asked], settings, folder, on_progress)
    except InputError as error:
        said = str(error)
        replaced = ("--reward: ", "metrics: ") if scorer is not None else ()
        raise InputError(_of_judge(said, replaced)) from None
    written = {result.model: result.answers.written for result in found.results}
    notes = [*found.notes, *_notes(found.results)]
    pairs = all_pairs(task.items, models, written)
    return Contest(
        tuple(models), asked, judge, folder, pairs, found.results, KeptLooks(folder), notes, seed=settings.sampling.seed
    )


def _of_judge(said: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        if said.startswith(prefix):
            return f"--judge: {said.removeprefix(prefix)}"
    return said


def _scorer(judge: JudgeName) -> str | None:
    """The metric whose values the judge goes by, where it scores each answer alone."""
    if judge.kind == REWARD:
        return REWARD
    return judge.target if judge.kind == "function" and not takes_pairs(judge.target) else None


def check_models(models: Sequence[str]) -> None:
    """Raise InputError for fewer than two models, and for one that is named twice."""
    if len(models) < 2:
        raise InputError(f"a comparison is of two models at least, such as `compare A B`; here is {', '.join(models)}")
    places: dict[str, str] = {}
    for name in models:
        place = str(Path(name).resolve()) if Path(name).exists() else name
        if place in places:
            also = "" if places[place] == name else f" (as {places[place]}, too)"
            raise InputError(f"{name} is named twice{also}: a model is compared with others")
        places[place] = name


def _check_prompts(task: Task) -> None:
    for item in task.items:
        if item.is_text:
            raise InputError(f"{item.place}: it is a plain text, which nobody answers; give prompts (column prompt)")
        if not item.question.strip():
            raise InputError(f"{item.place}: its prompt is empty; give it words, or leave it out")


def _notes(results: Sequence[Result]) -> list[str]:
    return [f"{Path(result.model).name}: {note}" for result in results for note in result.document["notes"]]


def load_pair_judge(contest: Contest, base: Path | None = None) -> PairJudge:
    """The judge that a contest names, but for people. Raises InputError."""
    judge = contest.judge
    if judge.kind == "model":
        return ModelJudge(judge.text, load_subject(judge.target, base), contest.seed)
    if judge.kind == EXPECTED:
        return ExpectedJudge()
    scorer = _scorer(judge)
    if scorer is None:
        return FunctionJudge(judge.target)
    scores = {result.model: result.answers.values[scorer] for result in contest.results}
    kept = sorted({of for result in contest.results for of in result.answers.kept_under})
    digest = function_digest(judge.target) if judge.kind == "function" else str(kept)
    values = sorted((model, *key, value) for model, own in scores.items() for key, value in own.items())
    return ScoreJudge(judge.text, f"{judge.text} {digest} {values}", scores)


def check_judge(judge: JudgeName) -> None:
    """Raise InputError for a function that is none, before any model is loaded."""
    if judge.kind == "function":
        load_judge(judge.target)
        if takes_pairs(judge.target):
            FunctionJudge(judge.target)


@dataclass
class Compared:
    """What came of a contest: the document of `--json`, outcomes, and the figures that pages show."""

    contest: Contest
    document: dict[str, Any]
    outcomes: list[tuple[Shown, Outcome]]


def settle(contest: Contest, resamples: int = 1000) -> Compared:
    """Rate the models by what was judged so far, and write the pairs with a winner for the stages that read them."""
    found = contest.outcomes()
    outcomes = [one for _, one in found]
    looks = contest.looks()
    records, unreadable = preferences(found)
    target = write_preferences(contest.folder, records)
    wins = wins_by_item(outcomes, contest.models)
    rated = ratings(wins, resamples, contest.seed)
    tokens = {result.model: _tokens(result.answers.written) for result in contest.results}
    notes = list(contest.notes)
    if rated.is_bounded:
        notes.append(
            "some models won, or lost, all against others, so that ratings have no bound: half a win each way was "
            "added to every pair"
        )
    document: dict[str, Any] = {
        "models": [
            {
                "model": name,
                "rating": _number(one.value),
                "low": _number(one.low),
                "high": _number(one.high),
                **(told := counts(outcomes, name)),
                "win_rate": _rate(told),
                "answer_tokens": _value(result, "answer_tokens"),
                "ended": _value(result, "ended"),
            }
            for name, one, result in zip(contest.models, rated.intervals, contest.results, strict=True)
        ],
        "position_bias": position_bias(looks),
        "judge": contest.judge.text,
        "task": contest.task.name,
        "prompts": len(contest.task.items),
        "pairs": with_holm(
            [pair_document(outcomes, one, other, tokens) for one, other in combinations(contest.models, 2)]
        ),
        "win_matrix": wins.sum(axis=0).tolist(),
        "looks": len(looks),
        "unjudged": sum(one.share is None for one in outcomes),
        "identical": sum(one.identical for one in outcomes),
        "tie_share": _share([one.share == 0.5 for one in outcomes if one.share is not None]),
        "length": winners_length(outcomes, tokens),
        "agreement": agreement(looks),
        "preferences": {"file": str(target), "pairs": len(records), "unreadable": unreadable},
        "notes": notes,
        "folder": str(contest.folder),
    }
    return Compared(contest, document, found)


def _tokens(written: Mapping[tuple[str, int], Written]) -> dict[str, int]:
    return {one.id: one.tokens for one in written.values() if one.sample == 0}


def _value(result: Result, name: str) -> float | None:
    told = result.document["metrics"].get(name)
    return None if told is None else _number(told["value"])


def _number(value: float) -> float | None:
    """The number, or None where there is none."""
    return float(value) if value == value else None


def _rate(told: Mapping[str, int]) -> float | None:
    """The share of wins, a tie being half."""
    judged = told["wins"] + told["losses"] + told["ties"]
    return (told["wins"] + told["ties"] / 2) / judged if judged else None


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None
