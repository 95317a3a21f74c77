"""Judges of pairs: scores that each answer has alone, a function of two answers, a local model that is asked."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core_training.foundation.bounded_reading import ForeignTextError, parse_value, shortened, shortened_text
from core_training.foundation.errors import InputError
from evaluation.answers.judging import ATTEMPTS, as_item, function_digest, load_own
from evaluation.answers.prompts import opening
from evaluation.answers.subjects import Subject
from evaluation.answers.writing import Writer
from evaluation.figures import words
from evaluation.items import Sampling, Task
from evaluation.pairs.pairwise import Look, Shown, Winner

PEOPLE, EXPECTED = "people", "expected"
_REWARD, _MODEL = "reward:", "model:"
_FORMS = "expected, reward:RUN, model:RUN|MODEL, FILE.py:function, module:function, people"


@dataclass(frozen=True)
class JudgeName:
    """What `--judge` names: `kind` is expected, reward, model, function or people; `target` run, model or function."""

    kind: str
    target: str
    text: str


def judge_name(text: str) -> JudgeName:
    """The judge that a text names. Raises InputError for one that names none."""
    if text in (PEOPLE, EXPECTED):
        return JudgeName(text, "", text)
    for prefix in (_REWARD, _MODEL):
        if text.startswith(prefix) and text != prefix:
            return JudgeName(prefix[:-1], text.removeprefix(prefix), text)
    place, colon, function = text.rpartition(":")
    if colon and place and function.isidentifier():
        return JudgeName("function", text, text)
    raise InputError(f"--judge: {shortened(text)} names no judge; give one of {_FORMS}")


Said = tuple[Shown, Look, str | None]
"""What was shown, what the judge made of it, and its words where it has any."""


class PairJudge(Protocol):
    """Somebody who says which of two answers is better. `digest` changes where verdicts might."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def looks(self, shown: Sequence[Shown]) -> Iterator[list[Said]]:
        """A look at each, batch by batch."""


@dataclass(frozen=True)
class ScoreJudge:
    """A number that every answer has alone, by model and item: the larger one wins, by their difference."""

    name: str
    digest: str
    scores: Mapping[str, Mapping[tuple[str, int], float]]

    def looks(self, shown: Sequence[Shown]) -> Iterator[list[Said]]:
        yield [(one, self._look(one), None) for one in shown]

    def _look(self, shown: Shown) -> Look:
        first, second = (self.scores[model][shown.item.id, 0] for model in (shown.first, shown.second))
        winner = Winner.TIE if first == second else Winner.FIRST if first > second else Winner.SECOND
        return Look(*shown.key, self.name, winner, abs(first - second))


class ExpectedJudge:
    """The answer with more of the words that were expected (token F1); no verdict where nothing was."""

    name = EXPECTED
    digest = "expected: token F1"

    def looks(self, shown: Sequence[Shown]) -> Iterator[list[Said]]:
        yield [(one, self._look(one), None) for one in shown]

    def _look(self, shown: Shown) -> Look:
        if not shown.item.references:
            return Look(*shown.key, self.name, None)
        first, second = (words.best(words.token_f1, text, shown.item.references) for text in shown.texts)
        winner = Winner.TIE if first == second else Winner.FIRST if first > second else Winner.SECOND
        return Look(*shown.key, self.name, winner, abs(first - second))


class FunctionJudge:
    """A function `(prompt, first, second)` of texts, with further parameters for columns of the items.

    It returns "first", "second" or "tie"; or a number, above 0 where the first is better; or None for no verdict.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.digest = f"{name} {function_digest(name)}"
        self._function = load_judge(name)
        self._wanted, self._wants_all = _columns(self._function)

    def looks(self, shown: Sequence[Shown]) -> Iterator[list[Said]]:
        for one in shown:
            yield [(one, self._look(one), None)]

    def _look(self, shown: Shown) -> Look:
        fields = {**shown.item.record.fields, "expected": shown.item.expected}
        columns = {name: value for name, value in fields.items() if name not in _PAIR}
        if not self._wants_all:
            columns = {name: value for name, value in columns.items() if name in self._wanted}
        if lacking := [name for name, needed in self._wanted.items() if needed and name not in columns]:
            raise InputError(f"--judge: {self.name} takes '{lacking[0]}', which is no column of {shown.item.place}")
        try:
            said = self._function(shown.item.question, *shown.texts, **columns)
        except (Exception, SystemExit) as error:  # the function is the person's own: it may raise anything
            words = shortened_text(f"{type(error).__name__}: {error}", 200)
            raise InputError(f"--judge: {self.name} failed on {shown.item.place}: {words}") from None
        winner, margin = self._read(said, shown)
        return Look(*shown.key, self.name, winner, margin)

    def _read(self, said: Any, shown: Shown) -> tuple[Winner | None, float | None]:
        if said is None:
            return None, None
        if isinstance(said, str) and said in tuple(Winner):
            return Winner(said), None
        if isinstance(said, bool) or not _is_number(said):
            raise InputError(
                f"--judge: {self.name} returned {shortened(said)} for {shown.item.place}; it must return 'first', "
                "'second' or 'tie', or a finite number (above 0: the first is better), or None for no verdict"
            )
        number = float(said)
        return (Winner.TIE if not number else Winner.FIRST if number > 0 else Winner.SECOND), abs(number)


_PAIR = ("prompt", "first", "second")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def load_judge(name: str) -> Any:
    """The function of that name. Raises InputError."""
    try:
        return load_own(name).function
    except InputError as error:
        raise InputError(f"--judge: {str(error).removeprefix('metrics: ')}") from None


def takes_pairs(name: str) -> bool:
    """Whether a function looks at two answers: it has parameters `first` and `second`; else it scores one."""
    try:
        return {"first", "second"} <= set(inspect.signature(load_judge(name)).parameters)
    except (TypeError, ValueError):  # one that is not written in Python
        return False


def _columns(function: Any) -> tuple[dict[str, bool], bool]:
    """The columns that a function names, with whether it cannot do without; whether it takes all."""
    parameters = list(inspect.signature(function).parameters.values())
    if [one.name for one in parameters[1:3]] != ["first", "second"]:
        raise InputError(
            f"--judge: {function.__name__} must take (prompt, first, second) in this order, not "
            f"({', '.join(one.name for one in parameters)})"
        )
    named = [one for one in parameters[3:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return {one.name: one.default is one.empty for one in named}, any(one.kind is one.VAR_KEYWORD for one in parameters)


_ASKED = """Two assistants answered the same conversation.

{conversation}

Answer A:
{first}

Answer B:
{second}

Which answer is better: more correct, more helpful, clearer? The order says nothing, and a longer answer is not better \
for that. Say {{"better": "A"}}, {{"better": "B"}} or {{"better": "tie"}} and nothing else."""
_AT_ONCE = 64
_TOKENS = 32


class ModelJudge:
    """A local model that is asked which answer is better, at most `ATTEMPTS` times; then there is no verdict."""

    def __init__(self, name: str, subject: Subject, seed: int = 0) -> None:
        self.name = name
        self.digest = f"model {subject.digest} {seed}"
        self._subject = subject
        self._seed = seed

    def looks(self, shown: Sequence[Shown]) -> Iterator[list[Said]]:
        for start in range(0, len(shown), _AT_ONCE):
            yield self._some(shown[start : start + _AT_ONCE])

    def _some(self, shown: Sequence[Shown]) -> list[Said]:
        said = [""] * len(shown)
        verdicts: list[Winner | None] = [None] * len(shown)
        for attempt in range(ATTEMPTS):
            left = [number for number, verdict in enumerate(verdicts) if verdict is None]
            texts = self._asked([shown[number] for number in left], attempt) if left else []
            for number, text in zip(left, texts, strict=True):
                said[number], verdicts[number] = text, winner_in(text)
        looks = [Look(*one.key, self.name, verdict) for one, verdict in zip(shown, verdicts, strict=True)]
        return list(zip(shown, looks, said, strict=True))

    def _asked(self, shown: Sequence[Shown], attempt: int) -> list[str]:
        """The judge's words on each; the second time they are drawn, as the likeliest did not do."""
        sampling = Sampling(_TOKENS, temperature=0.0 if attempt == 0 else 0.7, seed=self._seed + attempt)
        task = Task("pair", [], ())
        prompts = {
            str(number): opening(task, as_item(number, _question(one)), self._subject)
            for number, one in enumerate(shown)
        }
        found = {one.id: one.text for batch in Writer(self._subject, sampling).written(prompts) for one in batch}
        return [found[str(number)] for number in range(len(shown))]


def _question(shown: Shown) -> str:
    turns = [f"{message['role']}: {message['content']}" for message in shown.item.prompt]
    conversation = "\n\n".join(turns) or shown.item.plain
    return _ASKED.format(conversation=conversation, first=shown.texts[0], second=shown.texts[1])


_OBJECT = re.compile(r"\{[^{}]*\}", re.DOTALL)
_WORDS = {"a": Winner.FIRST, "b": Winner.SECOND, "tie": Winner.TIE}


def winner_in(text: str) -> Winner | None:
    """The verdict in a judge's words: its JSON, or A, B or tie at the beginning; None where there is neither."""
    for found in _OBJECT.findall(text):
        try:
            value = parse_value(found)
        except (ForeignTextError, ValueError):
            continue
        better = value.get("better") if isinstance(value, dict) else None
        if isinstance(better, str) and better.strip().lower() in _WORDS:
            return _WORDS[better.strip().lower()]
    first = re.match(r"\W*(?:answer\s+)?(A|B|tie)\b(?!\s+\w)", text, re.IGNORECASE)
    return None if first is None else _WORDS[first[1].lower()]
