"""The base model: loaded once, given its tuning mode, and shared by every engine of the process."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import core_training.offline as offline
from core_training.errors import InputError
from core_training.parameters import manifest_of, read_parameters
from core_training.recipe import Recipe
from core_training.state import Manifest, TrainableState
from core_training.tuning import TUNING_MODES


class BaseModel:
    """A model with its tokenizer, and the trainable state in which every site starts."""

    def __init__(self, recipe: Recipe) -> None:
        """Load the model that the recipe names. Raises InputError when its folder lacks something."""
        self.tokenizer: Any = load_tokenizer(recipe)
        self.folder = Path(recipe.model.name_or_path)
        if not any(self.folder.glob("*.safetensors")):
            raise InputError(
                f"{_where(self.folder)}: it has no *.safetensors weights (pickled weights are never loaded)"
            )
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, set_seed

        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=recipe.model.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{_where(self.folder)} cannot be loaded: {_first_line(error)}") from None
        if missing := sorted(loading["missing_keys"]):
            raise InputError(f"{_where(self.folder)}: its weights lack {len(missing)} tensors, such as '{missing[0]}'")
        if len(self.tokenizer) > (known := model.get_input_embeddings().num_embeddings):
            raise InputError(
                f"{_where(self.folder)}: its tokenizer has {len(self.tokenizer)} tokens, its model {known}"
            )
        set_seed(recipe.training.seed)
        self.model: Any = import_module(TUNING_MODES[recipe.tuning.mode]).apply(model, recipe)
        self.owner: Any = None
        """The engine whose state the parameters hold at the moment."""

    @cached_property
    def trainable_parameters(self) -> dict[str, Any]:
        """The parameters that are trained, by canonical name, sorted: the buffer order of the manifest."""
        named = {_canonical(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        return dict(sorted(named.items()))

    @cached_property
    def manifest(self) -> Manifest:
        return manifest_of(self.trainable_parameters)

    @cached_property
    def initial_state(self) -> TrainableState:
        """The state before any step. Ask for it before training: later it is only remembered."""
        return read_parameters(self.trainable_parameters)

    @cached_property
    def initial_digest(self) -> str:
        """SHA-256 (hex) over the base's weight files and the initial state: all that two sites must have in common."""
        hasher = hashlib.sha256(self.initial_state.digest.encode())
        for path in sorted(self.folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                hasher.update(hashlib.file_digest(stream, "sha256").digest())
        return hasher.hexdigest()


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer, with the recipe's chat template and a padding token. Raises InputError where it lacks."""
    folder = Path(recipe.model.name_or_path)
    _check_folder(folder)
    from transformers import AutoTokenizer

    offline.silence_libraries()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise InputError(f"{_where(folder)}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{_where(folder)}: its tokenizer has no end-of-sequence token (eos_token)")
    if recipe.model.chat_template is not None:
        _use_template(tokenizer, recipe.model.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_folder(folder: Path) -> None:
    where = _where(folder)
    if not folder.is_dir():
        raise InputError(f"{where}: no such folder. fedloom downloads nothing: fetch the model first, name its folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{where}: no config.json in it, so it is not a model folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{where}: it has no tokenizer (tokenizer.json); save one beside the weights")


def _where(folder: Path) -> str:
    return f"model.name_or_path: {folder}"


def _canonical(name: str) -> str:
    """A parameter's name without what depends on how PEFT calls its adapter."""
    return name.removeprefix("base_model.model.").replace(".default.", ".").replace(".default", "")


def _use_template(tokenizer: Any, path: str) -> None:
    """Give the tokenizer the chat template in the file `path`. Whether it takes each conversation is seen later."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"model.chat_template: {path} cannot be read: {error}") from None
    except TemplateSyntaxError as error:
        raise InputError(f"model.chat_template: {path}, line {error.lineno}: {error.message}") from None
    except TemplateError:
        pass


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
