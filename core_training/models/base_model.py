"""The base model: loaded once, given its tuning mode, and shared by every engine of the process."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.neftune import activate_neftune

from core_training.foundation.errors import InputError
from core_training.foundation.state import Manifest, TrainableState
from core_training.models.chat_template import ChatTemplate
from core_training.models.endings import end_tokens
from core_training.models.heads import innermost
from core_training.models.libraries import settle_libraries
from core_training.models.loaded_digest import tokenizer_digest
from core_training.models.loading import base_folder, load_starting_model, load_tokenizer, tune, vocabulary_digest
from core_training.models.parameters import (
    all_parameters,
    manifest_of,
    persistent_buffers,
    read_parameters,
    trainable_parameters,
    write_parameters,
)
from core_training.models.precision import train_in_float32
from core_training.models.quickening import quicken
from core_training.models.reading import check_writes, reading_of
from core_training.models.vocabulary import added_rows
from core_training.recipe.schema import Recipe
from core_training.tuning.base import load_tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class BaseModel:
    """A model with its tokenizer, and the trainable state in which every site starts."""

    def __init__(self, recipe: Recipe) -> None:
        """Load the model that the recipe starts from. Raises InputError when its folder lacks something."""
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(recipe)
        settle_libraries()
        self.folder = base_folder(recipe)
        self._day = date.fromisoformat(recipe.model.chat_date)
        start = load_starting_model(recipe, self.tokenizer)
        self._known_tokens = start.rows
        self._added_tokens = added_rows(self.tokenizer, recipe.model.add_tokens)
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            self.check_tokens(np.array([token]), f"model.name_or_path: {self.folder}")
        self.base_digest = start.digest
        """SHA-256 (hex) of the model that the run starts from, before tuning; see `StartingModel.digest`."""
        self._loaded = start.parts
        start.model.config.pad_token_id = self.tokenizer.pad_token_id
        may_pack = recipe.stage_part.packs and recipe.training.packing is not False
        rows = min(recipe.training.per_device_train_batch_size, 2)  # more of them are like two
        reading = reading_of(start.model, f"model.name_or_path: {self.folder}", rows)
        self.keeps_examples_apart = may_pack and reading.keeps_examples_apart
        """Whether examples can share a row, where the recipe packs any."""
        if recipe.stage_part.samples:
            check_writes(start.model, "stage")
        self.model: PreTrainedModel = tune(start.model, recipe)
        """The tuned model. Its head, if the stage has one, is `score` or `value_head` of the innermost model."""
        if not recipe.deepspeed.used:
            train_in_float32(self.model)
        quicken(self.model, recipe.training)
        if (alpha := recipe.training.neftune_noise_alpha) is not None:
            activate_neftune(self.model, alpha)
        self._buffers = {name: buffer.clone() for name, buffer in persistent_buffers(self.model).items()}
        self._frozen_digest = _frozen_digest(self.model, recipe)
        self._adapts = recipe.tuning_part.result == "adapter"
        self.reach_is_known = False
        """Whether a run has looked at which of the trained parameters its loss depends on."""
        self.owner: Any = None
        """The engine whose state the parameters hold at the moment."""

    def check_tokens(self, ids: npt.NDArray[np.int64], place: str) -> None:
        """Raise InputError for a token that the model has no row for, as its tokenizer may know more of them.

        Published models have such entries that nobody uses (Gemma 3's `<image_soft_token>` in the models of text).
        """
        if not len(ids) or int(ids.max()) < self._known_tokens:
            return
        if len(unknown := np.setdiff1d(ids[ids >= self._known_tokens], self._added_tokens)):
            raise InputError(
                f"{place}: token {unknown[-1]} is one of the tokenizer's {len(self.tokenizer)}, and the model has rows "
                f"for {self._known_tokens} alone; leave out what it stands for"
            )

    @cached_property
    def end_tokens(self) -> list[int]:
        """The tokens that end an answer; the tokenizer's eos is the first."""
        return end_tokens(innermost(self.model), self.chat_template)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template under which records and prompts are read."""
        return ChatTemplate(self.tokenizer, self._day)

    @cached_property
    def trainable_parameters(self) -> dict[str, Any]:
        """The parameters that are trained, by canonical name, sorted: the buffer order of the manifest."""
        return trainable_parameters(self.model)

    @property
    def has_frozen_weights(self) -> bool:
        """Whether the model has weights of its own that are not trained."""
        return not all(parameter.requires_grad for parameter in self.model.parameters())

    @property
    def result_parameters(self) -> dict[str, Any]:
        """The parameters of a result: the trained ones and, where it is a model, the frozen ones too."""
        return self.trainable_parameters if self._adapts else all_parameters(self.model)

    @cached_property
    def manifest(self) -> Manifest:
        return manifest_of(self.trainable_parameters)

    @cached_property
    def initial_state(self) -> TrainableState:
        """The state before any step. Ask for it before training: later it is only remembered."""
        return read_parameters(self.trainable_parameters)

    @contextmanager
    def reference_policy(self, deepspeed_engine: Any = None) -> Iterator[None]:
        """The model the run started from, for the whole run: its state in the parameters, without gradients.

        One model serves as policy and reference in every tuning mode. Under DeepSpeed every rank must enter.
        """
        present = read_parameters(self.trainable_parameters, deepspeed_engine)
        write_parameters(self.trainable_parameters, self.initial_state, deepspeed_engine)
        try:
            with torch.no_grad():
                yield
        finally:
            write_parameters(self.trainable_parameters, present, deepspeed_engine)

    def changed_buffers(self) -> list[str]:
        """The buffers of the model's files that are no longer what they were before training; they do not travel."""
        now = persistent_buffers(self.model) if self._buffers else {}  # another device has tensors of its own
        return [name for name, before in self._buffers.items() if not torch.equal(now[name].to(before.device), before)]

    @cached_property
    def initial_digest(self) -> str:
        """SHA-256 (hex) over what two sites' models must have in common, which is also the reference policy's digest.

        That is what was loaded, not the files it was loaded from: the base's weights, configuration and generation
        settings, the earlier runs merged in, how frozen weights are held, the initial state, and what turns a
        conversation into tokens. Logs the digest of each, for people at two sites to compare.
        """
        parts = {
            **self._loaded,
            "initial state": self.initial_state.digest,
            "frozen weights": self._frozen_digest,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "chat template": self.chat_template.digest,
        }
        _log.info("the run starts from %s", ", ".join(f"{name} {digest[:16]}" for name, digest in parts.items()))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def vocabulary_digest(self) -> str:
        """SHA-256 (hex) over the tokenizer's tokens and their numbers."""
        return vocabulary_digest(self.tokenizer)


def _frozen_digest(model: PreTrainedModel, recipe: Recipe) -> str:
    """SHA-256 (hex) over how the frozen weights are held, where it is not as in the files."""
    mode = load_tuning(recipe)
    settings: dict[str, Any] = {"dtype": recipe.model.dtype, **mode.held}
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and not mode.is_as_in_files(name):
            hasher.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
