"""The files that make a model: which belong to it beside its weights, where these lie, and their digest."""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import (
    ForeignTextError,
    open_regular,
    read_json,
    shortened,
    shortened_text,
)
from core_training.foundation.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_SMALL_FILE = 256 * 2**20
"""Bytes of an index, or of what `is_small_file` names. The largest tokenizers take a tenth of it."""
_LARGEST_CONFIG = 16 * 2**20
_NOT_BESIDE_WEIGHTS = ("adapter_config.json",)
_DISTRIBUTED = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors", re.ASCII)
_COMPUTED_BY = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_WAY_TO_COMPUTE = re.compile(r"[a-z0-9_]+", re.ASCII)
"""What a library has itself; OWNER/NAME would be code of the hub's."""
_POSITIONS = re.compile(r"(positions|position_embeddings|n_ctx|seq_len|seq_length|sequence_length)$")
_MOST = (
    (re.compile(r"(size|width|dim|rank|heads?|channels|labels)$|^(d|n)_(model|embd|ff|inner)$"), 10**7),
    (re.compile(r"(layers?|depths?)$"), 10_000),
    (re.compile(r"experts?(_|$)"), 100_000),
    (_POSITIONS, 2**24),
)
"""The most that a number in a configuration may be, by its key: a multiple of what the largest models have."""
_MOST_OF_A_FAMILY = {
    **dict.fromkeys(("codegen", "ctrl", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "xglm"), (_POSITIONS, 16_384)),
    "minimax": (re.compile(r"block_size$"), 1024),
}
"""The same of families that build a table or a square of all positions, in some at each layer, by their model_type."""
_SMALL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|[\w.-]+\.tiktoken"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja",
    re.ASCII,
)


def is_small_file(name: str) -> bool:
    """Whether a file is a model's configuration, tokenizer or chat template, none of which is ever run or unpickled."""
    return _SMALL_FILES.fullmatch(name) is not None


def check_model_folder(folder: Path) -> None:
    """Look at a model's folder before any library does. Raises InputError for what nobody would expect to be loaded.

    transformers reads other weights than those that people look at where a folder has an adapter, parts of a
    distributed checkpoint, or a configuration that names a file. Pipes and devices never end.
    """
    for path in sorted(folder.iterdir()):
        if path.name in _NOT_BESIDE_WEIGHTS or _DISTRIBUTED.fullmatch(path.name):
            raise InputError(
                f"{path}: it would change what is loaded of the model beside it; move it to another folder "
                "(an earlier run goes on with model.adapters)"
            )
        if is_small_file(path.name) or path.name == INDEX or path.suffix == ".safetensors":
            _check_file(path)
    if (folder / INDEX).exists():
        for name in indexed_names(folder / INDEX):
            _check_file(folder / name)
    _check_config(folder / "config.json")
    _check_tokenizer_config(folder / "tokenizer_config.json")


def check_result_folder(folder: Path) -> None:
    """Look at what a run left before any library does. Raises InputError for a file that is none: it may never end."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            _check_file(path)


def _check_file(path: Path) -> None:
    most = LARGEST_SMALL_FILE if path.name == INDEX or is_small_file(path.name) else None
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if most is not None and size > most:
        raise InputError(f"{path}: {size} bytes, and no model's has more than {most}")


def _check_config(path: Path) -> None:
    config = settings_in(path)
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part.get("transformers_weights") is not None:
            raise InputError(
                f"{path}: transformers_weights names another file than {WHOLE} or {INDEX}; take it out, and name the "
                "weights as all others do"
            )
        for key in _COMPUTED_BY:
            if part.get(key) is not None and not _WAY_TO_COMPUTE.fullmatch(str(part[key])):
                raise InputError(f"{path}: {key} is no way to compute that transformers has itself; take it out")
    _check_sizes(path, config)


def _check_sizes(path: Path, settings: dict[str, Any]) -> None:
    """Raise InputError for a number of layers, experts or values that would take for ever to build, at any depth."""
    family = settings.get("model_type")
    bounds = [_MOST_OF_A_FAMILY[family], *_MOST] if family in _MOST_OF_A_FAMILY else _MOST
    for key, value in settings.items():
        most = next((most for kind, most in bounds if kind.search(key)), None)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                _check_sizes(path, one)
            elif most is not None and isinstance(one, int | float) and one > most:
                said = f"{shortened_text(key, 60)} is {shortened(one)}"
                raise InputError(f"{path}: {said}, and no model's of its kind is over {most:,}")


def _check_tokenizer_config(path: Path) -> None:
    if "fast_tokenizer_files" in settings_in(path):
        raise InputError(
            f"{path}: fast_tokenizer_files names another tokenizer than tokenizer.json; take it out, and name the file "
            "as all others do"
        )


def settings_in(path: Path) -> dict[str, Any]:
    """A JSON object of a model's; empty where there is no such file. Raises InputError for any other content."""
    try:
        settings = read_json(path, _LARGEST_CONFIG)
    except FileNotFoundError:
        return {}
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: it is no model's configuration")
    return settings


def weight_names(folder: Path) -> list[str]:
    """The names of the files that a model is loaded from, sorted; of results that are no whole model, all.

    Nothing where there are none. Raises InputError for an index that cannot be read.
    """
    if (folder / WHOLE).is_file():
        return [WHOLE]
    if (folder / INDEX).is_file():
        return indexed_names(folder / INDEX)
    return sorted(path.name for path in folder.glob("*.safetensors"))


def indexed_names(index: Path) -> list[str]:
    """The names of the files that an index says the weights are in, sorted. Raises InputError for any other content."""
    try:
        names = sorted({str(name) for name in read_json(index, LARGEST_SMALL_FILE)["weight_map"].values()})
    except (OSError, ForeignTextError, KeyError, TypeError, AttributeError) as error:
        said = shortened_text(error, 200)
        raise InputError(f"{index}: it cannot be read as an index of weight files: {said}") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: '{shortened_text(name, 100)}' is no safetensors file beside it")
    return names


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over the weight files in a folder, in the order of their names.

    Raises InputError for one that cannot be read.
    """
    hasher = hashlib.sha256()
    for name in weight_names(folder):
        _check_file(folder / name)
        status = (folder / name).stat()
        hasher.update(_file_digest(folder / name, status.st_size, status.st_mtime_ns))
    return hasher.hexdigest()


@lru_cache(maxsize=1000)
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a file, read once as long as its size and time of change stay."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
