"""Environments apart from fedloom's, for programs whose libraries do not go with its own: found, or made once.

One is filled under another name and renamed when it has shown that it works, so that none is ever half made.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from core_training.foundation import background
from core_training.foundation.durable import scratch_of
from core_training.foundation.environment import STAY_OFFLINE
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.places import is_folder, is_there
from evaluation.bridges.foreign_programs import Program, last_words, run

PINS = Path(__file__).with_name("environments")
"""The files that say what lies in them."""
_MARK = "made-by-fedloom.json"
_MAKING_SECONDS = 1800.0
"""Seconds that one step of making may take, and that another who makes it is waited for."""

Say = Callable[[str], None]


class Maker:
    """Carries out the steps of filling a folder; what they print is kept for the error that one may end in."""

    def __init__(self, kind: OwnEnvironment, folder: Path, log: Path) -> None:
        self.folder = folder
        self._kind = kind
        self._log = log

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def do(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Raises RunError where the step fails, with the end of what it said."""
        program = Program(name, [str(part) for part in command], self.folder, environment or {}, _MAKING_SECONDS)
        if code := run(program, self._log):
            raise RunError(
                f"the environment of {self._kind.title} could not be made: {name} ended with code {code} and said: "
                f"{last_words(self._log)}. {self._kind.remedy}"
            )

    def install(self, requirements: Path) -> None:
        """Make a Python environment of the folder, with the packages in a file of pins."""
        self.do("venv", [sys.executable, "-m", "venv", self.folder])
        pip: list[str | Path] = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        self.do("pip", [*pip, "--requirement", requirements])


@dataclass(frozen=True)
class OwnEnvironment:
    """One kind of environment: what it holds, how it is filled and tried, and how a person names one of his own.

    `pins` are the files in `PINS` that decide over what lies in it, `program` what has to be in any of them.
    """

    name: str
    title: str
    size: str
    option: str
    variable: str
    pins: tuple[str, ...]
    program: str
    fill: Callable[[Maker], None]

    @property
    def remedy(self) -> str:
        return (
            f"It takes packages from an index once (pip's and npm's own settings name a mirror); where none can be "
            f"reached, bring an environment from another machine and name it with {self.option} or {self.variable}"
        )

    @property
    def digest(self) -> str:
        """What its pins and this interpreter's version come to."""
        told = hashlib.sha256(f"{sys.version_info[0]}.{sys.version_info[1]}".encode())
        for name in self.pins:
            told.update((PINS / name).read_bytes())
        return told.hexdigest()[:12]

    def found(self, named: Path | None) -> Path | None:
        """The environment's folder, where it is there already. Raises InputError for a named one that is none."""
        folder = self.place(named)
        if (folder / self.program).exists():
            return folder
        if self._is_named(named) and is_there(folder) and (not is_folder(folder) or any(folder.iterdir())):
            raise InputError(
                f"{self.option}: {folder} is no environment of {self.title}: it has no {self.program}; name one that "
                "is, or a new folder, in which one is made"
            )
        return None

    def place(self, named: Path | None) -> Path:
        """Where it is, or would be made: as named, by the variable, or among the caches, by its digest."""
        told = named or os.environ.get(self.variable)
        return Path(told).expanduser().absolute() if told else caches() / f"{self.name}-{self.digest}"

    def ready(self, named: Path | None, say: Say) -> Path:
        """The environment's folder; it is made first where it is not there.

        Raises InputError where it may not be made, and RunError where that fails.
        """
        if (folder := self.found(named)) is not None:
            return folder
        if os.environ.get(STAY_OFFLINE) == "1":
            raise InputError(
                f"{self.title} needs an environment of its own, and {STAY_OFFLINE}=1 says to fetch nothing. "
                f"{self.remedy}"
            )
        folder = self.place(named)
        with background.claim(folder.with_name(f".{folder.name}.lock"), _MAKING_SECONDS):
            if (made := self.found(named)) is not None:  # by whoever had the lock before
                return made
            say(f"making the environment of {self.title} in {folder} ({self.size}, once; it takes some minutes)")
            self._make(folder)
        return folder

    def _is_named(self, named: Path | None) -> bool:
        return named is not None or bool(os.environ.get(self.variable))

    def _make(self, folder: Path) -> None:
        scratch = scratch_of(folder)
        with tempfile.TemporaryDirectory() as logs:
            try:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                self.fill(Maker(self, scratch, Path(logs) / "log"))
                (scratch / _MARK).write_text(json.dumps({"environment": self.name, "digest": self.digest}))
                os.sync()  # else a machine that stops could leave the name, and not what is in it
                with suppress(FileNotFoundError):
                    folder.rmdir()  # an empty one, as a person may have made
                scratch.rename(folder)
            except OSError as error:
                raise RunError(f"{folder} could not be written ({error}). {self.remedy}") from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def caches() -> Path:
    """The folder of environments that nobody named a place for."""
    own = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache") / "fedloom" / "environments"
