"""The data sets of LLaMA-Factory's `dataset_info.json`: which file each is, and what its columns and roles are called.

Knows nothing of how files are read, or of stages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from core_training.foundation.bounded_reading import ForeignTextError, place_and_words, read_json, shortened_text
from core_training.foundation.errors import InputError

INFO_FILE = "dataset_info.json"


@dataclass(frozen=True)
class DataSet:
    """One entry of a `dataset_info.json`: its file or folder, and what its columns and roles are called there."""

    path: Path
    most: int | None
    """Records to read of it, from the first; all of them where this is None."""
    columns: Mapping[str, str]
    """Our column names, and those in the file."""
    tags: Mapping[str, str] | None
    """The names that ShareGPT's parts have in the file; None for Alpaca's layout."""

    def fields(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record's fields under the names that `data.formats` knows; columns of other layouts are hidden."""
        fields = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        for name in ("conversations", "chosen", "rejected"):
            if self.tags is not None and name in fields:
                fields[name] = self._turns(fields[name])
        hidden = {*self.columns.values(), *_OTHER_COLUMNS}
        return {name: value for name, value in record.items() if name not in hidden} | fields

    def _turns(self, value: Any) -> Any:
        """Messages with the roles and keys that chat templates know; what is no message stays as it is."""
        tags = self.tags or {}
        roles = {tags[tag]: name for tag, name in _ROLES.items()}

        def turn(value: Any) -> Any:
            if not isinstance(value, dict) or tags["content_tag"] not in value:
                return value
            role = value.get(tags["role_tag"])
            if not isinstance(role, str):
                return value
            more = {key: one for key, one in value.items() if key not in (tags["role_tag"], tags["content_tag"])}
            return {**more, "role": roles.get(role, role), "content": value[tags["content_tag"]]}

        return [turn(one) for one in value] if isinstance(value, list) else turn(value)


_ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "tools": "tools",
}
"""LLaMA-Factory's keys of columns, and our columns."""
_SHAREGPT = {
    "messages": "conversations",
    "system": "system",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "tools": "tools",
}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
_SILENT = {
    "alpaca": {"instruction": "instruction", "input": "input", "output": "output"},
    "sharegpt": {"conversations": "conversations"},
    "openai": {"conversations": "conversations"},
}
"""The columns of an entry that does not name them."""
_OTHER_COLUMNS = ("text", "prompt", "completion", "messages", "conversations", "label")
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_NAME = re.compile(r"(?P<name>.+?)(\[:(?P<most>\d{1,18})\])?$")


class _Entry(BaseModel):
    """An entry as it stands in the file."""

    file_name: str = Field(min_length=1)
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    columns: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    ranking: bool = False
    """Whether the records are preference pairs, which their columns say too."""


_ENTRY_KEYS = tuple(_Entry.model_fields)


def names_data_set(path: Path) -> bool:
    """Whether this is `…/dataset_info.json:NAME`."""
    return path.name.startswith(f"{INFO_FILE}:")


def read_entry(path: Path) -> DataSet:
    """The data set that `FOLDER/dataset_info.json:NAME` or `…:NAME[:COUNT]` stands for.

    Raises InputError where there is none, or none whose records are files.
    """
    info = path.with_name(INFO_FILE)
    try:
        entries = read_json(info)
    except OSError as error:
        raise InputError(f"data: {info} cannot be read: {error.strerror or error}") from None
    except ForeignTextError as error:
        raise InputError(f"data: {info}: {error}") from None
    match = _NAME.match(path.name.removeprefix(f"{INFO_FILE}:"))
    name, most = (match["name"], match["most"]) if match else ("", None)
    entry = entries.get(name) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        known = shortened_text(", ".join(list(entries)[:10])) if isinstance(entries, dict) else "no data sets"
        raise InputError(f"data: {info} has no data set '{name}'; it has {known}")
    where = f"data: {info}: {name}"
    if "file_name" not in entry:
        remote = ", ".join(key for key in _REMOTE if key in entry) or "it names no file"
        raise InputError(f"{where}: {remote}: fedloom downloads nothing: fetch the data, name the file with file_name")
    if unknown := [key for key in entry if key not in (*_ENTRY_KEYS, *_REMOTE, "file_sha1")]:
        theirs = shortened_text(", ".join(unknown))
        raise InputError(f"{where}: no counterpart here for {theirs}; an entry has {', '.join(_ENTRY_KEYS)}")
    described = _checked(entry, where)
    names = _ALPACA if described.formatting == "alpaca" else _SHAREGPT
    columns, tags = described.columns or {}, described.tags or {}
    for key, given, allowed in (("columns", columns, list(names)), ("tags", tags, list(_TAGS))):
        if foreign := ", ".join(name for name in given if name not in allowed):
            raise InputError(f"{where}: {key}: no counterpart here for {foreign}; it can be {', '.join(allowed)}")
    renamed = {names[key]: theirs for key, theirs in columns.items()}
    if set(renamed) == {"instruction"}:  # plain text, which pre-training reads
        renamed["text"] = renamed["instruction"]
    return DataSet(
        path=info.parent / described.file_name,
        most=None if most is None else int(most),
        columns=_SILENT[described.formatting] | renamed,
        tags=None if described.formatting == "alpaca" else _TAGS | tags,
    )


def _checked(entry: dict[str, Any], where: str) -> _Entry:
    try:
        described = _Entry.model_validate(entry)
    except ValidationError as error:
        key, said = place_and_words(error)
        raise InputError(f"{where}: {key}: {said[0].lower()}{said[1:]}") from None
    if names_data_set(Path(described.file_name)):
        raise InputError(f"{where}: file_name: '{described.file_name}' is an entry itself; name a file or folder")
    return described
