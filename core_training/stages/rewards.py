"""What judges sampled answers: a reward model that an earlier run trained, or a Python function of the person's own.

A reward function is a path on the machine that trains: only its name stands in the recipe, and no code ever travels.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from core_training.errors import InputError, RunError
from core_training.models.base_model import BaseModel
from core_training.models.results import load_reward_model
from core_training.recipe import Recipe
from core_training.stages.base import Batch
from core_training.stages.rollout import UNLIMITED, context_length, texts

_KEY = "rollout.reward_function"


class Judge(Protocol):
    """Gives each answer of a batch (see `Sampler.sample`) its reward, float32 of shape (answers,)."""

    room: int
    """The most tokens, prompt and answer together, that it can read."""

    def __call__(self, answers: Batch) -> torch.Tensor: ...

    def try_out(self, prompts: Sequence[str]) -> None:
        """Look for mistakes before training starts. Raises InputError."""
        ...


def load_judge(recipe: Recipe, base: BaseModel) -> Judge:
    """The judge that the recipe names, for answers of this model. Raises InputError."""
    settings = recipe.rollout
    if settings.reward_function is not None:
        return FunctionJudge(load_function(settings.reward_function), settings.reward_function, base.tokenizer)
    assert settings.reward_model is not None  # the recipe has one of the two
    return ModelJudge(_reward_model(Path(settings.reward_model), base.vocabulary_digest))


@lru_cache(maxsize=1)
def _reward_model(run: Path, vocabulary: str) -> Any:
    """One for all the engines of a process: simulated sites have the same judge."""
    return load_reward_model(run, vocabulary)


class ModelJudge:
    """A reward model, which scores the last token of prompt and answer."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.room = context_length(model)

    def __call__(self, answers: Batch) -> torch.Tensor:
        self._model.to(answers["input_ids"].device)
        with torch.no_grad():
            output = self._model(input_ids=answers["input_ids"], position_ids=answers["position_ids"], use_cache=False)
        return output.logits.squeeze(-1).float()  # type: ignore[no-any-return]

    def try_out(self, prompts: Sequence[str]) -> None:
        """Nothing: `load_reward_model` has looked."""


class FunctionJudge:
    """A function of (prompts, completions), two lists of texts, that returns a list of numbers."""

    room = UNLIMITED

    def __init__(self, function: Callable[..., Any], name: str, tokenizer: Any) -> None:
        self._function = function
        self._name = name
        self._tokenizer = tokenizer

    def __call__(self, answers: Batch) -> torch.Tensor:
        try:
            rewards = self._rewards(*texts(answers, self._tokenizer))
        except InputError as error:
            raise RunError(str(error)) from error.__cause__
        return torch.tensor(rewards, dtype=torch.float32, device=answers["input_ids"].device)

    def try_out(self, prompts: Sequence[str]) -> None:
        """One call with empty answers, which any model may give."""
        self._rewards(list(prompts), [""] * len(prompts))

    def _rewards(self, prompts: list[str], completions: list[str]) -> list[float]:
        try:
            rewards = [float(number) for number in self._function(prompts, completions)]
        except Exception as error:  # the function is the person's own: it may raise anything
            raise InputError(f"{_KEY}: {self._name} failed: {type(error).__name__}: {error}") from error
        if len(rewards) != len(completions):
            raise InputError(
                f"{_KEY}: {self._name} returned {len(rewards)} numbers for {len(completions)} completions; "
                "it must return one for each"
            )
        for number, completion in zip(rewards, completions, strict=True):
            if not math.isfinite(number):
                raise InputError(
                    f"{_KEY}: {self._name} returned {number} for {completion[:60]!r}; return finite numbers"
                )
        return rewards


def load_function(target: str) -> Callable[..., Any]:
    """The function that `FILE.py:name` stands for. Raises InputError."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{_KEY}: {target!r} is not of the form FILE.py:name")
    if not path.is_file():
        raise InputError(f"{_KEY}: {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the person's own: it may raise anything
        raise InputError(f"{_KEY}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{_KEY}: {path} has no function '{name}'")
    return function  # type: ignore[no-any-return]
