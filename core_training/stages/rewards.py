"""The judges of sampled answers: a reward model that an earlier run trained, or functions of the person's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from core_training.data.examples import Batch
from core_training.data.records import Record
from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.model_files import weights_digest
from core_training.models.base_model import BaseModel
from core_training.models.context import context_length
from core_training.models.heads import end_scores
from core_training.models.results import find_result, load_known_reward_model
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import read_origin
from core_training.stages.judge import Judge, Judged
from core_training.stages.reward_functions import FunctionJudge, load_function

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_judge(recipe: Recipe, base: BaseModel) -> Judge:
    """The judge that the recipe names, for answers of this model. Raises InputError."""
    settings = recipe.rollout
    if settings.reward_function is not None:
        functions = [
            load_function(name, weight, settings.max_new_tokens) for name, weight in settings.reward_functions.items()
        ]
        return FunctionJudge(functions, base.tokenizer)
    assert settings.reward_model is not None  # the recipe has one of the two
    run = Path(settings.reward_model)
    files = reward_model_digest(run)
    model, loaded = _reward_model(run, base.vocabulary_digest, files)
    return ModelJudge(model, hashlib.sha256(f"{files}\n{loaded}".encode()).hexdigest())


def reward_model_digest(run: Path) -> str:
    """SHA-256 (hex) over the files that make the reward model in a run folder: its weights, and its recipe."""
    try:
        result = find_result(run)
        parts = [result.recipe.engine_digest, result.recipe.model.dtype, read_origin(result.folder).base_digest]
    except (InputError, ProtocolError) as error:
        raise InputError(f"rollout.reward_model: {error}") from None
    return hashlib.sha256("\n".join([*parts, weights_digest(result.folder)]).encode()).hexdigest()


@lru_cache(maxsize=1)
def _reward_model(run: Path, vocabulary: str, files: str) -> tuple[PreTrainedModel, str]:
    """One for all the engines of a process: simulated sites have the same judge. With the digest of what was loaded."""
    return load_known_reward_model(run, vocabulary)


class ModelJudge:
    """A reward model, which scores the last token of prompt and answer."""

    def __init__(self, model: PreTrainedModel, digest: str) -> None:
        self._model: nn.Module = model
        self.digest: str | None = digest
        self.columns: list[str] = []
        self.room = context_length(model)

    def __call__(self, answers: Batch) -> Judged:
        self._model.to(answers["input_ids"].device)
        with torch.no_grad():
            return Judged(end_scores(self._model, self._model.get_submodule("score"), answers))

    def columns_of(self, record: Record) -> bytes:
        return b""

    def try_out(self, prompts: Sequence[str], columns: Sequence[bytes]) -> None:
        """Do nothing: `load_known_reward_model` has looked."""
