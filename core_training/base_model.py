"""The base model: loaded once, given its tuning mode, and shared by every engine of the process."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import core_training.offline as offline
from core_training.errors import InputError
from core_training.recipe import Recipe
from core_training.state import Manifest, TrainableState
from core_training.tuning import TUNING_MODES


class BaseModel:
    """A model with its tokenizer, and the trainable state in which every site starts."""

    def __init__(self, recipe: Recipe) -> None:
        """Load the model that the recipe names. Raises InputError when its folder lacks something."""
        self.folder = Path(recipe.model.name_or_path)
        self._check_folder()
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

        offline.silence_libraries()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=recipe.model.dtype, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"model.name_or_path: {self.folder} cannot be loaded: {_first_line(error)}") from None
        if recipe.model.chat_template is not None:
            self.tokenizer.chat_template = _read_template(recipe.model.chat_template)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        set_seed(recipe.training.seed)
        self.model: Any = import_module(TUNING_MODES[recipe.tuning.mode]).apply(model, recipe)
        self.model.config.use_cache = False
        self.owner: Any = None
        """The engine whose state the parameters hold at the moment."""

    @cached_property
    def trainable_parameters(self) -> dict[str, Any]:
        """The parameters that are trained, by canonical name, sorted: the buffer order of the manifest."""
        named = {_canonical(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        return dict(sorted(named.items()))

    @cached_property
    def manifest(self) -> Manifest:
        # Under ZeRO-3 a parameter's own shape is empty while it is not gathered.
        return Manifest.of({n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.trainable_parameters.items()})

    @cached_property
    def initial_state(self) -> TrainableState:
        """The state before any step. Ask for it before training: later it is only remembered."""
        from core_training.parameters import read_parameters

        return read_parameters(self)

    @cached_property
    def frozen_digest(self) -> str:
        """SHA-256 (hex) over the base's weight files: two sites with one digest start from the same model."""
        hasher = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                hasher.update(hashlib.file_digest(stream, "sha256").digest())
        return hasher.hexdigest()

    def _check_folder(self) -> None:
        where = f"model.name_or_path: {self.folder}"
        if not self.folder.is_dir():
            raise InputError(f"{where}: no such folder. fedloom downloads nothing: fetch the model first, name its folder")
        if not (self.folder / "config.json").is_file():
            raise InputError(f"{where}: no config.json in it, so it is not a model folder")
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise InputError(f"{where}: it has no tokenizer (tokenizer.json); save one beside the weights")
        if not any(self.folder.glob("*.safetensors")):
            raise InputError(f"{where}: it has no *.safetensors weights (pickled weights are never loaded)")


def _canonical(name: str) -> str:
    """A parameter's name without what depends on how PEFT calls its adapter."""
    return name.removeprefix("base_model.model.").replace(".default.", ".").replace(".default", "")


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"model.chat_template: {path} cannot be read: {error}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
