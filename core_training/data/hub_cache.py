"""Data sets by the names they have on the hub, from what an earlier download left on this machine."""

from __future__ import annotations

import re
from pathlib import Path

import core_training.foundation.environment  # noqa: F401 - before anything that might call home
from core_training.foundation.errors import InputError

SHARD = re.compile(r"-(?P<number>\d{5})-of-(?P<all>\d{5})(?=\.|$)")
"""The end of the name of one of a data set's numbered files."""
_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<config>[\w.-]+))?(:(?P<split>\w+))?")


def cached_files(name: str) -> list[Path]:
    """The files of `OWNER/NAME`, `OWNER/NAME/CONFIG` or either with `:SPLIT` (unless said, `train`).

    Nothing where the name is of no such form. Raises InputError where no download of it is at hand.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return []
    try:
        return _whole(sorted(_found(match["name"], match["config"], match["split"] or "train")))
    except Exception as error:  # whatever a builder raises
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"data: '{name}' matches no file (paths are relative to {Path.cwd()}), and as a name on the hub it is not "
            f"in the cache of this machine ({said}); fetch it where the hub can be reached: "
            f"hf download --repo-type dataset {match['name']}"
        ) from None


def _whole(files: list[Path]) -> list[Path]:
    """The files. Raises ValueError where some of a data set's numbered files are not there."""
    there: dict[str, set[str]] = {}
    for file in files:
        if shard := SHARD.search(file.name):
            there.setdefault(f"{file.name[: shard.start()]} {shard['all']}", set()).add(shard["number"])
    for name, numbers in there.items():
        if len(numbers) < (total := int(name.rpartition(" ")[2])):
            raise ValueError(f"it has {len(numbers)} of {total} files: the download is not complete")
    return files


def is_hub_name(name: str) -> bool:
    """Whether a data set on the hub could have that name."""
    return _NAME.fullmatch(name) is not None


def _found(name: str, config: str | None, split: str) -> list[Path]:
    """The data set's own files where they were downloaded; the Arrow files that `datasets` made of them otherwise."""
    import datasets
    from huggingface_hub import snapshot_download

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
    except OSError:  # it was never downloaded as files
        loaded = datasets.load_dataset(name, config, split=split)
        return [Path(file["filename"]) for file in loaded.cache_files]
    parts = datasets.load_dataset_builder(folder, config).config.data_files or {}
    if split not in parts:
        raise ValueError(f"it has no part '{split}', but {', '.join(map(str, parts)) or 'none'}")
    return [Path(file) for file in parts[split]]
