"""The judges of sampled answers: a reward model that an earlier run trained, or a Python function of the person's own.

A reward function is a path on the machine that trains: only its name stands in the recipe, and no code ever travels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from core_training.data.examples import Batch
from core_training.data.records import Record
from core_training.data.rows import COLUMNS
from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.models.base_model import BaseModel
from core_training.models.context import UNLIMITED, context_length
from core_training.models.heads import end_scores
from core_training.models.loading import weights_digest
from core_training.models.results import find_result, load_reward_model
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import read_origin
from core_training.stages.rollout import texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEY = "rollout.reward_function"


class Judge(Protocol):
    """A judge gives each answer of a batch (see `Sampler.sample`) its reward, float32 of shape (answers,)."""

    room: int
    """The most tokens, prompt and answer together, that it can read."""
    digest: str | None
    """SHA-256 (hex) of a reward model, which sites must have in common. None for a function: it is the site's own."""

    def __call__(self, answers: Batch) -> torch.Tensor: ...

    columns: list[str]
    """The columns of a prompt's record that it wants beside prompt and answer; `**` stands for all."""

    def columns_of(self, record: Record) -> bytes:
        """These columns of a record as JSON; empty for none."""
        ...

    def try_out(self, prompts: Sequence[str], columns: Sequence[bytes]) -> None:
        """Look for mistakes before training starts. Raises InputError."""
        ...


def load_judge(recipe: Recipe, base: BaseModel) -> Judge:
    """The judge that the recipe names, for answers of this model. Raises InputError."""
    settings = recipe.rollout
    if settings.reward_function is not None:
        return FunctionJudge(load_function(settings.reward_function), settings.reward_function, base.tokenizer)
    assert settings.reward_model is not None  # the recipe has one of the two
    run = Path(settings.reward_model)
    digest = reward_model_digest(run)
    return ModelJudge(_reward_model(run, base.vocabulary_digest, digest), digest)


def reward_model_digest(run: Path) -> str:
    """SHA-256 (hex) over what makes the reward model in a run folder: its weights, its base and its recipe."""
    try:
        result = find_result(run)
        parts = [result.recipe.engine_digest, result.recipe.model.dtype, read_origin(result.folder).base_digest]
    except (InputError, ProtocolError) as error:
        raise InputError(f"rollout.reward_model: {error}") from None
    return hashlib.sha256("\n".join([*parts, weights_digest(result.folder)]).encode()).hexdigest()


@lru_cache(maxsize=1)
def _reward_model(run: Path, vocabulary: str, digest: str) -> PreTrainedModel:
    """One for all the engines of a process: simulated sites have the same judge."""
    return load_reward_model(run, vocabulary)


class ModelJudge:
    """A reward model, which scores the last token of prompt and answer."""

    def __init__(self, model: PreTrainedModel, digest: str) -> None:
        self._model: nn.Module = model
        self.digest: str | None = digest
        self.columns: list[str] = []
        self.room = context_length(model)

    def __call__(self, answers: Batch) -> torch.Tensor:
        self._model.to(answers["input_ids"].device)
        with torch.no_grad():
            return end_scores(self._model, self._model.get_submodule("score"), answers)

    def columns_of(self, record: Record) -> bytes:
        return b""

    def try_out(self, prompts: Sequence[str], columns: Sequence[bytes]) -> None:
        """Do nothing: `load_reward_model` has looked."""


class FunctionJudge:
    """A function of (prompts, completions), two lists of texts, that returns a list of numbers.

    Further parameters are columns of the prompts' records, a list of values each; `**columns` takes all of them.
    """

    room = UNLIMITED
    digest: str | None = None

    def __init__(self, function: Callable[..., Any], name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._function = function
        self._name = name
        self._tokenizer = tokenizer
        self._wanted, self._wants_all = _further_parameters(function)
        self.columns = [*self._wanted, *(["**"] if self._wants_all else [])]

    def columns_of(self, record: Record) -> bytes:
        """Raises InputError where a column is missing that the function cannot do without."""
        columns = {name: value for name, value in record.fields.items() if name not in _OWN_NAMES}
        if not self._wants_all:
            columns = {name: value for name, value in columns.items() if name in self._wanted}
        for name, needed in self._wanted.items():
            if needed and name not in columns:
                raise InputError(f"{record.place}: no column '{name}', which {_KEY} {self._name} takes")
        return json.dumps(columns, default=str).encode() if columns else b""

    def __call__(self, answers: Batch) -> torch.Tensor:
        columns = [bytes(row.tolist()).rstrip(b"\0") for row in answers[COLUMNS].cpu()] if COLUMNS in answers else []
        try:
            return self._rewards(*texts(answers, self._tokenizer), columns).to(answers["input_ids"].device)
        except InputError as error:
            raise RunError(str(error)) from None

    def try_out(self, prompts: Sequence[str], columns: Sequence[bytes] = ()) -> None:
        """Call the function once with empty answers, which any model may give."""
        self._rewards(list(prompts), [""] * len(prompts), columns)

    def _rewards(self, prompts: list[str], completions: list[str], columns: Sequence[bytes]) -> torch.Tensor:
        """The function's rewards. Raises InputError without a word of the texts: others read a site's errors too."""
        try:
            answered = self._function(prompts, completions, **_by_name(columns))
            rewards = torch.tensor(list(map(float, answered)), dtype=torch.float32)
        except (Exception, SystemExit) as error:  # the function is the person's own: it may raise anything
            raise InputError(
                f"{_KEY}: {self._name} failed: {type(error).__name__}{self._line(error)}; "
                "it must return a list of numbers, one for each completion"
            ) from None
        if len(rewards) != len(completions):
            raise InputError(
                f"{_KEY}: {self._name} returned {len(rewards)} numbers for {len(completions)} completions; "
                "it must return one for each"
            )
        for place, number in enumerate(rewards.tolist(), start=1):
            if not math.isfinite(number):
                raise InputError(
                    f"{_KEY}: {self._name} returned {number} for completion {place} of {len(completions)}; "
                    "return finite numbers (float32)"
                )
        return rewards

    def _line(self, error: BaseException) -> str:
        """The line of the person's file that the error came from; nothing where the returned value caused it."""
        file = Path(self._name.rpartition(":")[0]).absolute()
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        return f" in line {lines[-1]}" if lines else ""


_OWN_NAMES = ("prompt", "prompts", "completion", "completions")
"""Columns that a function has by another name already."""


def _further_parameters(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """The parameters behind the first two, with whether they have no default; and whether it takes any."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # one that is not written in Python
        return {}, False
    kinds = {one.kind for one in parameters}
    named = [one for one in parameters[2:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return {one.name: one.default is one.empty for one in named}, inspect.Parameter.VAR_KEYWORD in kinds


def _by_name(columns: Sequence[bytes]) -> dict[str, list[Any]]:
    """The rows' columns as lists of values; None where a row has none of that name."""
    rows = [json.loads(row or b"{}") for row in columns]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def load_function(target: str) -> Callable[..., Any]:
    """The function that `FILE.py:name` stands for. Raises InputError."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{_KEY}: {target!r} is not of the form FILE.py:name")
    if not path.is_file():
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
