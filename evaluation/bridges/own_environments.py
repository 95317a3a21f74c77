"""Environments apart from fedloom's, for programs whose libraries do not go with its own: found, or made once.

One is filled under another name and renamed when it has shown that it works, so that none is ever half made. One that
another account could have made or changed is not run.
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
from core_training.foundation.bounded_reading import ForeignTextError, read_json
from core_training.foundation.durable import scratch_of
from core_training.foundation.environment import STAY_OFFLINE
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.places import is_folder, is_there
from evaluation.bridges.foreign_programs import Program, last_words, run
from evaluation.bridges.ownership import make_for_oneself, take_from_others, why_distrusted

PINS = Path(__file__).with_name("environments")
"""The files that say what lies in them."""
_OURS = Path("fedloom", "environments")
"""The folder of environments among all programs' caches."""
_MARK = "made-by-fedloom.json"
_MAKING_SECONDS = 1800.0
"""Seconds that one step of making may take, and that another who makes it is waited for."""
_OF_FETCHING = frozenset(
    (
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS"),
        *("XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "NETRC"),
    )
)
"""The variables that say how an index is reached, besides pip's and npm's own."""
_OF_INSTALLERS = ("PIP_", "npm_config_", "NPM_CONFIG_")

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

    def fetch(self, name: str, command: Sequence[str | Path]) -> None:
        """As `do`, for a step that takes packages from an index: it is told how one is reached, as no other is."""
        told = (item for item in os.environ.items() if item[0] in _OF_FETCHING or item[0].startswith(_OF_INSTALLERS))
        self.do(name, command, dict(told))

    def install(self, requirements: Path) -> None:
        """Make a Python environment of the folder, with the packages in a file of pins."""
        self.do("venv", [sys.executable, "-m", "venv", self.folder])
        pip: list[str | Path] = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        self.fetch("pip", [*pip, "--requirement", requirements])


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
        """The environment's folder, where it is there already.

        Raises InputError for a named one that is none, and for one that another account could have made or changed.
        """
        folder = self.place(named)
        if (folder / self.program).exists():
            self._check_ours(folder, is_named=self._is_named(named))
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
        return Path(told).expanduser().absolute() if told else caches() / _OURS / f"{self.name}-{self.digest}"

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
        if not self._is_named(named):
            self._make_place(folder.parent)
        with background.claim(folder.with_name(f".{folder.name}.lock"), _MAKING_SECONDS):
            if (made := self.found(named)) is not None:  # by whoever had the lock before
                return made
            say(f"making the environment of {self.title} in {folder} ({self.size}, once; it takes some minutes)")
            self._make(folder)
        return folder

    def _is_named(self, named: Path | None) -> bool:
        return named is not None or bool(os.environ.get(self.variable))

    def _check_ours(self, folder: Path, *, is_named: bool) -> None:
        """Raise InputError where others could have changed the environment, or nothing shows that it was made here."""
        program = folder / self.program
        self._check_places([*([] if is_named else _up_to(caches(), folder.parent)), *_up_to(folder, program)])
        if not is_named:
            self._check_mark(folder)

    def _check_places(self, places: Sequence[Path]) -> None:
        for why in map(why_distrusted, places):
            if why is not None:
                raise InputError(
                    f"{self.title} is not run, as {why}: its environment may be nobody's but yours; mend that, or name "
                    f"a folder that is yours with {self.option} or {self.variable}"
                )

    def _check_mark(self, folder: Path) -> None:
        mark = folder / _MARK
        if is_there(mark):
            self._check_places([mark])
        try:
            known = read_json(mark)
        except (OSError, ForeignTextError):
            known = None
        if known != self._mark:
            raise InputError(
                f"{self.title} is not run: {mark} does not say that {folder} was made here from these pins; remove it "
                f"and one is made, or name one that you trust with {self.option} or {self.variable}"
            )

    @property
    def _mark(self) -> dict[str, str]:
        return {"environment": self.name, "digest": self.digest}

    def _make_place(self, place: Path) -> None:
        """Make the folder of environments in the cache, where nobody else could put one."""
        above = _up_to(caches(), place)
        self._check_places([folder for folder in above if is_there(folder)])
        try:
            make_for_oneself(place)
        except OSError as error:
            raise InputError(
                f"{place} cannot be made: {error.strerror}; name another folder with {self.option} or {self.variable}"
            ) from None
        self._check_places(above)  # another may have been quicker

    def _make(self, folder: Path) -> None:
        scratch = scratch_of(folder)
        with tempfile.TemporaryDirectory() as logs:
            try:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(mode=0o755, parents=True)
                self.fill(Maker(self, scratch, Path(logs) / "log"))
                (scratch / _MARK).write_text(json.dumps(self._mark))
                take_from_others(scratch)
                os.sync()  # else a machine that stops could leave the name, and not what is in it
                with suppress(FileNotFoundError):
                    folder.rmdir()  # an empty one, as a person may have made
                scratch.rename(folder)
            except OSError as error:
                raise RunError(f"{folder} could not be written ({error}). {self.remedy}") from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def caches() -> Path:
    """The folder of all programs' caches, in which environments lie that nobody named a place for."""
    own = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache").absolute()


def _up_to(top: Path, place: Path) -> list[Path]:
    """A place and the folders that it lies in, from `top` on."""
    return [*reversed([folder for folder in place.parents if folder.is_relative_to(top)]), place]
