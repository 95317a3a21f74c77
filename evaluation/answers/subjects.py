"""What is evaluated: a finished run, an exported folder or a base model, loaded and ready to be asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import core_training.foundation.environment  # noqa: F401  # isort: skip - before PyTorch is imported
import torch

from core_training.foundation.bounded_reading import shortened_text
from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.foundation.model_files import check_result_folder, settings_in, weights_digest
from core_training.foundation.places import is_folder
from core_training.models.base_model import BaseModel
from core_training.models.context import context_length
from core_training.models.results import Result, find_result, load_result
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Subject:
    """A model under its name. `recipe` is the run's, or one that stands for a base model's; `run` its folder."""

    name: str
    base: BaseModel
    recipe: Recipe
    digest: str
    """SHA-256 (hex) over what was trained and what it stands on: answers are kept under it."""
    run: Path | None = None
    reads_past_padding: bool | None = None
    """Whether padding changes nothing, once it was looked at."""

    @property
    def model(self) -> PreTrainedModel:
        return self.base.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        return self.base.model.device

    @property
    def context(self) -> int:
        return context_length(self.base.model)

    @property
    def has_template(self) -> bool:
        return self.base.chat_template.exists


def run_of(name: str) -> Path | None:
    """The run folder of that name, or None where it is none."""
    folder = Path(name)
    return folder if is_folder(folder) and (folder / "recipe.yaml").is_file() else None


def load_subject(name: str, base: Path | None = None, site: str | None = None) -> Subject:
    """Load what a name stands for. Raises InputError for what is no model here, and for a reward model."""
    if (run := run_of(name)) is not None:
        return result_subject(name, find_result(run, base, site), run)
    folder = find_model(name)
    if folder is None:
        raise InputError(
            f"{name}: no run folder, model folder or exported adapter, nor a model in the hub's cache; fetch one with "
            "`fedloom model get OWNER/NAME`"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return _ready(_with_adapter(name, folder, base))
    recipe = _stand_in(folder)
    loaded = BaseModel(recipe)
    return _ready(Subject(name, loaded, recipe, _digest(loaded.base_digest)))


def result_subject(name: str, result: Result, run: Path | None = None) -> Subject:
    """Load a run's result. Raises as `load_subject`."""
    if result.recipe.stage == "reward":
        raise InputError(f"{name} is a reward model: it scores answers and gives none; name it with --reward")
    loaded = load_result(result)
    digest = _digest(weights_digest(result.folder), loaded.base_digest, result.recipe.engine_digest)
    return _ready(Subject(name, loaded, result.recipe, digest, run))


def _with_adapter(name: str, folder: Path, base: Path | None) -> Subject:
    """An adapter in PEFT's layout, on the base model that it names."""
    from peft import PeftModel

    check_result_folder(folder)
    named = str(base) if base is not None else str(settings_in(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
    if (found := find_model(named)) is None:
        raise InputError(f"{name}: its base model '{named}' is not here; name it with --base DIR")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{name}: it has no {ADAPTER_WEIGHTS} (pickled weights are never loaded)")
    recipe = _stand_in(found)
    loaded = BaseModel(recipe)
    try:
        adapted: Any = PeftModel.from_pretrained(loaded.model, str(folder), local_files_only=True)
    except Exception as error:  # whatever does not fit
        raise InputError(f"{name} does not fit the base model {found}: {shortened_text(error, 300)}") from None
    loaded.model = adapted
    return Subject(name, loaded, recipe, _digest(weights_digest(folder), loaded.base_digest))


def _stand_in(folder: Path) -> Recipe:
    """A recipe under which a model is loaded as it lies there."""
    document = {
        "model": {"name_or_path": str(folder)},
        "stage": "sft",
        "tuning": {"mode": "full"},
        "data": {"train": "records.jsonl"},
    }
    return parse_recipe(json.dumps(document))


def _ready(subject: Subject) -> Subject:
    """The subject on the machine's GPU, where it has one; without dropout."""
    model: Any = subject.base.model
    if torch.cuda.is_available():
        model.to("cuda")
    model.eval()
    model.config.use_cache = True
    model.requires_grad_(False)
    return subject


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
