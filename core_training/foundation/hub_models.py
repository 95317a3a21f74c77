"""Base models by the names they have on the hub, as an earlier download left them in this machine's cache.

A name is `OWNER/NAME` (old models have none but `NAME`), and `OWNER/NAME@REVISION` for a branch, a tag or a commit. One
word says both, as in the hub's own addresses: a recipe, a `site.yaml` and a command line mean the same by it, and a
folder cannot be given a revision. Reads the cache's folders and reaches nothing: `hub_fetch` fetches.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from core_training.foundation.durable import commit_folder
from core_training.foundation.model_files import INDEX, WHOLE, is_small_file, weight_names
from core_training.foundation.places import is_folder

_NAME = re.compile(r"(?P<name>(\w[\w.-]*/)?\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_NAME = 96
_MAIN = "main"


@dataclass(frozen=True)
class HubModel:
    """A model on the hub; without a revision, the one that its branch `main` was at when it was fetched."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which is the same files for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> HubModel:
        """The same model, pinned."""
        return replace(self, revision=commit)

    @property
    def cache_folder(self) -> Path:
        """Where the hub's cache keeps the model (see "Understand caching" in huggingface_hub's documentation)."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    @property
    def reference(self) -> Path:
        """The cache's file that says which commit a branch or tag was at."""
        return self.cache_folder / "refs" / (self.revision or _MAIN)

    def snapshot(self) -> Path | None:
        """The folder of its files, named after the commit; None where it was not fetched, or not all of it."""
        commit = self.revision if self.is_pinned else _content(self.reference)
        if commit is None or not _COMMIT.fullmatch(commit):
            return None
        folder = self.cache_folder / "snapshots" / commit
        return folder if _is_whole(folder) else None


def hub_model(name_or_path: str) -> HubModel | None:
    """The model on the hub that is meant; None where it is a folder here, or could be no name on the hub."""
    match = _NAME.fullmatch(name_or_path)
    if match is None or is_folder(name_or_path):
        return None
    if len(match["name"]) > _LONGEST_NAME or "--" in match["name"] or ".." in name_or_path:
        return None
    return HubModel(match["name"], match["revision"])


def find_model(name_or_path: str) -> Path | None:
    """The folder of a base model: the one of that name, or the hub's files in the cache; None where neither is here."""
    if is_folder(name_or_path):
        return Path(name_or_path)
    model = hub_model(name_or_path)
    return None if model is None else model.snapshot()


def copy_model(snapshot: Path, to: Path) -> None:
    """Write a model's files, which are links into the cache, into a new folder; not what else was fetched with them.

    Raises RunError when the disk refuses.
    """
    with commit_folder(to) as scratch:
        for path in snapshot.rglob("*"):
            name = str(path.relative_to(snapshot))
            if is_small_file(name) or name in (INDEX, *weight_names(snapshot)):
                (scratch / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, scratch / name)


def _is_whole(folder: Path) -> bool:
    """Whether there are a configuration and all weights: other programs fetch files one by one, as they need them."""
    if not any((folder / name).is_file() for name in (WHOLE, INDEX)):
        return False
    return all((folder / name).is_file() for name in ("config.json", *weight_names(folder)))


def _content(reference: Path) -> str | None:
    try:
        return reference.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
