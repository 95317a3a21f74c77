"""A model without its weights: enough to turn records into tokens, at no cost in memory or time."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from core_training.foundation.bounded_reading import shortened_text
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.libraries import settle_libraries
from core_training.models.loading import base_folder, load_tokenizer
from core_training.models.vocabulary import added_rows
from core_training.recipe.schema import Recipe


def bare_model(folder: Path) -> PreTrainedModel:
    """The model of a folder on the meta device, in no time and memory. Raises InputError for a configuration."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a configuration leads the libraries to
        raise InputError(f"model.name_or_path: {folder} cannot be read: {shortened_text(error, 300)}") from None
    return model


class Outline(BaseModel):
    """The tokenizer of a recipe's model, and its layers without values. What depends on weights is not there."""

    def __init__(self, recipe: Recipe) -> None:
        """Raises InputError where the model's folder lacks a tokenizer or a configuration."""
        self.tokenizer = load_tokenizer(recipe)
        settle_libraries()
        self.folder = base_folder(recipe)
        self._day = date.fromisoformat(recipe.model.chat_date)
        self.model = bare_model(self.folder)
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        self._known_tokens = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        self._added_tokens = added_rows(self.tokenizer, recipe.model.add_tokens)
        self.keeps_examples_apart = False
