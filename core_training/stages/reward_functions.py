"""Reward functions: Python functions of the person's own, and TRL's ready ones by name.

A function of one's own is a path on the machine that trains: only its name stands in the recipe, and no code travels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core_training.data.examples import IGNORED, Batch
from core_training.data.records import Record
from core_training.data.rows import COLUMNS
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.places import is_there
from core_training.models.context import UNLIMITED
from core_training.stages.judge import Judged
from core_training.stages.rollout import texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "rollout.reward_function"
_TRL = "trl:"

_GIVEN = ("prompts", "completions")
_OWN_NAMES = ("prompt", "prompts", "completion", "completions")
"""Columns that a function has by another name already."""
_TRLS_NAMES = ("completion_ids", "log_extra", "log_metric", "reasoning_delimiters")
"""Parameters of TRL's functions that are no columns."""

_NAME_LENGTH = 28
"""Characters of a function's name in that of its figure."""

# DAPO (Yu et al. 2025) starts to punish length at four fifths of the longest answer.
_PUNISHED_SHARE = 5


@dataclass(frozen=True)
class Answered:
    """Prompts, answers to them (texts, and the tokens of the answers), and columns of the prompts' records."""

    prompts: list[str]
    completions: list[str]
    ids: list[list[int]]
    columns: list[dict[str, Any]]


@dataclass(frozen=True)
class RewardFunction:
    """A function of (prompts, completions), two lists of texts, that returns a list of numbers.

    Further parameters are columns of the prompts' records, a list of values each; `**columns` takes all of them. A
    function of TRL's is called as TRL does. None in the place of a number says that there is nothing to judge: 0.
    """

    function: Callable[..., Any]
    name: str
    weight: float = 1.0

    @property
    def short_name(self) -> str:
        """The function's own name."""
        return self.name.rpartition(":")[2]

    @property
    def is_trls(self) -> bool:
        return self.name.startswith(_TRL)

    @property
    def wants_all(self) -> bool:
        """Whether the function takes any column there is; TRL's take them and look at none."""
        return self._parameters[1] and not self.is_trls

    @property
    def wanted(self) -> dict[str, bool]:
        """The columns that it names, with whether it cannot do without."""
        return self._parameters[0]

    @cached_property
    def _parameters(self) -> tuple[dict[str, bool], bool]:
        """The parameters besides prompts and completions, with whether they have no default; whether any will do."""
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # one that is not written in Python
            return {}, False
        kinds = {one.kind for one in parameters}
        if self.is_trls:
            parameters = [one for one in parameters if one.name not in (*_OWN_NAMES, *_TRLS_NAMES)]
        else:
            parameters = [one for one in parameters[0 if self._own_names else 2 :] if one.name not in _GIVEN]
        named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        return {one.name: one.default is one.empty for one in named}, inspect.Parameter.VAR_KEYWORD in kinds

    @cached_property
    def _own_names(self) -> list[str]:
        """Those of `prompts` and `completions` that the function names; without any they are its first parameters."""
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):
            return []
        return [
            name
            for name in _GIVEN
            if name in parameters and parameters[name].kind is not parameters[name].POSITIONAL_ONLY
        ]

    def rewards(self, answered: Answered) -> torch.Tensor:
        """A reward for each answer. Raises InputError without a word of the texts: others read a site's errors too."""
        try:
            given = self._answer(answered)
            numbers = [0.0 if one is None else float(one) for one in given]
            rewards = torch.tensor(numbers, dtype=torch.float32)
        except (Exception, SystemExit) as error:  # the function is the person's own: it may raise anything
            missing = f" ({error})" if self.is_trls and isinstance(error, ImportError) else ""
            raise InputError(
                f"{_KEY}: {self.name} failed: {type(error).__name__}{self._line(error)}{missing}; "
                "it must return a list of numbers, one for each completion"
            ) from None
        if len(rewards) != len(answered.completions):
            raise InputError(
                f"{_KEY}: {self.name} returned {len(rewards)} numbers for {len(answered.completions)} completions; "
                "it must return one for each"
            )
        for place, number in enumerate(rewards.tolist(), start=1):
            if not math.isfinite(number):
                raise InputError(
                    f"{_KEY}: {self.name} returned {number} for completion {place} of {len(answered.completions)}; "
                    "return finite numbers (float32)"
                )
        return rewards

    def _answer(self, answered: Answered) -> Any:
        columns = _by_name(answered.columns)
        if not self.wants_all:
            columns = {name: values for name, values in columns.items() if name in self.wanted}
        if not self.is_trls and not self._own_names:
            return self.function(answered.prompts, answered.completions, **columns)
        if not self.is_trls:
            own = {"prompts": answered.prompts, "completions": answered.completions}
            return self.function(**{name: own[name] for name in self._own_names}, **columns)
        return self.function(
            prompts=[[{"role": "user", "content": prompt}] for prompt in answered.prompts],
            completions=[[{"role": "assistant", "content": text}] for text in answered.completions],
            completion_ids=answered.ids,
            **columns,
        )

    def _line(self, error: BaseException) -> str:
        """The line of the person's file that the error came from; nothing where the returned value caused it."""
        file = Path(self.name.rpartition(":")[0]).absolute()
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        return f" in line {lines[-1]}" if lines else ""


class FunctionJudge:
    """One or several functions, whose rewards are added up by their weights."""

    room = UNLIMITED
    digest: str | None = None

    def __init__(self, functions: Sequence[RewardFunction], tokenizer: PreTrainedTokenizerBase) -> None:
        self._functions = functions
        self._tokenizer = tokenizer
        wanted = dict.fromkeys(name for function in functions for name in function.wanted)
        self._wants_all = any(function.wants_all for function in functions)
        self.columns = [*wanted, *(["**"] if self._wants_all else [])]

    def columns_of(self, record: Record) -> bytes:
        """Raises InputError where a column is missing that a function cannot do without."""
        columns = {name: value for name, value in record.fields.items() if name not in _OWN_NAMES}
        if not self._wants_all:
            columns = {name: value for name, value in columns.items() if name in self.columns}
        for function in self._functions:
            for name, needed in function.wanted.items():
                if needed and name not in columns:
                    raise InputError(f"{record.place}: no column '{name}', which {_KEY} {function.name} takes")
        return json.dumps(columns, default=str).encode() if columns else b""

    def __call__(self, answers: Batch) -> Judged:
        prompts, completions = texts(answers, self._tokenizer)
        rows = [bytes(row.tolist()).rstrip(b"\0") for row in answers[COLUMNS].cpu()] if COLUMNS in answers else []
        ids = [
            row[labels != IGNORED].tolist() for row, labels in zip(answers["input_ids"], answers["labels"], strict=True)
        ]
        try:
            judged = self._judged(Answered(prompts, completions, ids, [json.loads(row or b"{}") for row in rows]))
        except InputError as error:
            raise RunError(str(error)) from None
        device = answers["input_ids"].device
        return Judged(judged.total.to(device), {name: part.to(device) for name, part in judged.parts.items()})

    def try_out(self, prompts: Sequence[str], columns: Sequence[bytes] = ()) -> None:
        """Call the functions once with empty answers, which any model may give."""
        rows = [json.loads(row or b"{}") for row in columns]
        self._judged(Answered(list(prompts), [""] * len(prompts), [[] for _ in prompts], rows))

    def _judged(self, answered: Answered) -> Judged:
        parts = [function.rewards(answered) for function in self._functions]
        weighted = [function.weight * part for function, part in zip(self._functions, parts, strict=True)]
        total = torch.stack(weighted).sum(dim=0)
        return Judged(total, dict(zip(self._names(), parts, strict=True)) if len(parts) > 1 else {})

    def _names(self) -> list[str]:
        """A name for each function, as figures have them: its own, with a number where two would have the same."""
        names: list[str] = []
        for function in self._functions:
            name = re.sub("[^a-z0-9_]", "_", function.short_name.lower())[:_NAME_LENGTH]
            taken = sum(other == name or other.startswith(f"{name}_") for other in names)
            names.append(f"{name}_{taken + 1}" if name in names else name)
        return names


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns as lists of values; None where a row has none of that name."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def load_function(target: str, weight: float, max_new_tokens: int) -> RewardFunction:
    """The function that `FILE.py:name` or `trl:name` stands for. Raises InputError."""
    if target.startswith(_TRL):
        return RewardFunction(_trls_function(target, max_new_tokens), target, weight)
    return RewardFunction(_own_function(target), target, weight)


def _trls_function(target: str, max_new_tokens: int) -> Callable[..., Any]:
    from trl import rewards

    known: dict[str, Callable[[], Any]] = {
        "accuracy_reward": lambda: rewards.accuracy_reward,
        "reasoning_accuracy_reward": lambda: rewards.reasoning_accuracy_reward,
        "think_format_reward": lambda: rewards.think_format_reward,
        "cosine_scaled_reward": lambda: rewards.get_cosine_scaled_reward(max_new_tokens),
        "repetition_penalty_reward": rewards.get_repetition_penalty_reward,
        "soft_overlong_punishment": lambda: rewards.get_soft_overlong_punishment(
            max_new_tokens, max_new_tokens // _PUNISHED_SHARE
        ),
    }
    name = target.removeprefix(_TRL)
    if name not in known:
        raise InputError(f"{_KEY}: TRL's functions here are {', '.join(known)}, not {name!r}")
    made: Callable[..., Any] = known[name]()
    return made


def _own_function(target: str) -> Callable[..., Any]:
    file, _, name = target.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{_KEY}: {target!r} is not of the form FILE.py:name (or trl:name)")
    if not (is_there(path) and path.is_file()):
        raise InputError(f"{_KEY}: {path}: no such file")
    name_in_process = f"reward_function_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name_in_process, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name_in_process] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the person's own: it may raise anything
        raise InputError(f"{_KEY}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{_KEY}: {path} has no function '{name}'")
    return function  # type: ignore[no-any-return]
