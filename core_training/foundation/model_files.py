"""The files that make a model: which belong to it beside its weights, where these lie, and their digest."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

from core_training.foundation.errors import InputError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LARGEST_INDEX = 256 * 2**20
_SMALL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|[\w.-]+\.tiktoken"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja",
    re.ASCII,
)


def is_small_file(name: str) -> bool:
    """Whether a file is a model's configuration, tokenizer or chat template, none of which is ever run or unpickled."""
    return _SMALL_FILES.fullmatch(name) is not None


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
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it is larger than {_LARGEST_INDEX} bytes")
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: it cannot be read as an index of weight files: {error}") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index}: '{name}' is no safetensors file beside it")
    return names


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over the weight files in a folder, in the order of their names."""
    hasher = hashlib.sha256()
    for name in weight_names(folder):
        status = (folder / name).stat()
        hasher.update(_file_digest(folder / name, status.st_size, status.st_mtime_ns))
    return hasher.hexdigest()


@lru_cache(maxsize=1000)
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a file, read once as long as its size and time of change stay."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
