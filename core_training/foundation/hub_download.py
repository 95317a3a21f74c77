"""The process that fetches a model: `python -m core_training.foundation.hub_download NAME REVISION PROGRESS`.

Prints one JSON object: the commit, or an error. Takes safetensors, tokenizer, configuration and templates, and neither
pickles nor code. Holds every file against the size and hash that the hub lists, before the name of a branch stands for
it. Knows nothing of recipes. What switches the hub off (`environment`) must not be imported here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from core_training.foundation.durable import commit_file
from core_training.foundation.errors import FedloomError, InputError, RunError
from core_training.foundation.hub_models import HubModel
from core_training.foundation.model_files import INDEX, LARGEST_SMALL_FILE, WHOLE, indexed_names, is_small_file

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "run it again: what is whole is kept"


@dataclass(frozen=True)
class _Listed:
    """A file as the hub lists it: its size in bytes, and its SHA-256 or, of a small one, git's hash."""

    name: str
    size: int
    sha256: str | None
    git_hash: str | None

    def fits(self, path: Path) -> bool:
        """Whether a file is the one that is listed."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        hasher = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                hasher.update(block)
        return hasher.hexdigest() == (self.sha256 or self.git_hash)


class _Download:
    """One model's download into the hub's cache."""

    def __init__(self, model: HubModel) -> None:
        """Ask the hub for the commit and its files. Raises InputError where they cannot be trained."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(model.name, revision=model.revision, files_metadata=True)
        self._model = model
        self._pinned = model.at(str(info.sha))
        if not self._pinned.is_pinned:
            raise RunError(f"{model}: the hub names no commit, but '{info.sha}'")
        self._files = {file.name: file for file in map(_listed, info.siblings or [])}
        self._check()

    @property
    def commit(self) -> str:
        return str(self._pinned.revision)

    def run(self, *, shows_progress: bool) -> None:
        """Fetch the small files and then the weights, so that a snapshot with all its weights has all else."""
        from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

        disable_progress_bars()
        small = [name for name in self._files if is_small_file(name)]
        self._check_sizes(small)
        index = [INDEX] if WHOLE not in self._files else []
        self._fetch(small + index)
        weights = indexed_names(self._folder / INDEX) if index else [WHOLE]
        if unlisted := [name for name in weights if name not in self._files]:
            raise InputError(f"{self._model}: its index names {unlisted[0]}, which it does not have")
        self._check_room(weights)
        if shows_progress:
            enable_progress_bars()
        self._fetch(weights)
        if not self._model.is_pinned:
            commit_file(self._model.reference, self.commit.encode())

    @property
    def _folder(self) -> Path:
        return self._pinned.cache_folder / "snapshots" / self.commit

    def _check(self) -> None:
        if "config.json" not in self._files:
            raise InputError(f"{self._model}: it has no config.json, so it is no model that transformers loads")
        if WHOLE not in self._files and INDEX not in self._files:
            pickled = " (it has pickled ones, which are never fetched)" if self._has_pickles() else ""
            raise InputError(f"{self._model}: it has no model.safetensors{pickled}; name a model that has")

    def _has_pickles(self) -> bool:
        return any(name.endswith(_PICKLES) for name in self._files)

    def _check_sizes(self, small: Iterable[str]) -> None:
        for name in small:
            if not 0 <= self._files[name].size <= LARGEST_SMALL_FILE:
                raise InputError(
                    f"{self._model}: the hub lists {name} with {self._files[name].size:,} bytes; of a file beside the "
                    f"weights at most {LARGEST_SMALL_FILE:,} are fetched"
                )

    def _check_room(self, names: Iterable[str]) -> None:
        missing = sum(self._files[name].size for name in names if not (self._folder / name).exists())
        if missing > (free := shutil.disk_usage(self._folder).free):
            raise InputError(
                f"{self._model}: {missing / 2**30:.1f} GiB are to be fetched, and there is room for "
                f"{free / 2**30:.1f} in {self._folder}; make room, or name another place with HF_HUB_CACHE"
            )

    def _fetch(self, names: list[str]) -> None:
        from huggingface_hub import hf_hub_download

        for name in names:
            path = Path(hf_hub_download(self._model.name, name, revision=self.commit))
            if not self._files[name].fits(path):
                blob = path.resolve()
                path.unlink(missing_ok=True)
                if blob.parent == (self._pinned.cache_folder / "blobs").resolve():  # a link may lead anywhere
                    blob.unlink(missing_ok=True)
                raise RunError(
                    f"{self._model}: {name} is not what the hub lists (size or hash), and was removed; {_AGAIN}"
                )


def _listed(file: Any) -> _Listed:
    """What the hub says of a file."""
    return _Listed(
        name=str(file.rfilename),
        size=int(file.size if file.size is not None else -1),
        sha256=file.lfs.sha256 if file.lfs is not None else None,
        git_hash=file.blob_id,
    )


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _explained(model: HubModel, error: Exception) -> FedloomError:
    """What went wrong, and what to do about it."""
    from huggingface_hub import constants, errors

    hub = _without_password(constants.ENDPOINT)
    if isinstance(error, FedloomError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{model}: it is given to those who accept its terms: do so on {hub}/{model.name}, then `hf auth login` "
            "here, or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{model}: {hub} has the model, and not this revision of it")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{model}: {hub} has no model of that name, or a private one that this machine's token does not open"
        )
    said = str(error).strip().partition("\n")[0].replace(constants.ENDPOINT, hub) or type(error).__name__
    return RunError(f"{model}: the download from {hub} broke off: {said}; {_AGAIN}")


def main() -> None:
    """Fetch the model of the command line and print the answer."""
    name, revision, progress = sys.argv[1:]
    model = HubModel(name, revision or None)
    answer: dict[str, Any]
    try:
        download = _Download(model)
        download.run(shows_progress=progress == "1")
        answer = {"commit": download.commit}
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # whatever the hub's library, its transport or the disk raises
        explained = _explained(model, error)
        answer = {"error": str(explained), "is_input": isinstance(explained, InputError)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
