"""Says which of our files lean on what a library does without promising it, so that a failure names them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])


def leans(*files: str) -> Callable[[Test], Test]:
    """Names the files of ours in whatever makes the test fail."""

    def naming(test: Test) -> Test:
        @functools.wraps(test)
        def named(*args: Any, **kwargs: Any) -> Any:
            try:
                return test(*args, **kwargs)
            except BaseException as error:
                error.add_note(f"{', '.join(files)}: leans on this; look there before the library's version is raised")
                raise

        return named  # type: ignore[return-value]

    return naming


def names(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    """A table of `module:dotted.name` by file of ours, as (file, name) for a parametrised test."""
    return [(file, name) for file, own in table.items() for name in own]


def look_up(file: str, name: str) -> Any:
    """What `module:dotted.name` is. Fails, naming the file of ours, where the library does not have it."""
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in filter(None, path.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise AssertionError(f"{file} leans on {name}, which is not there: {error}") from None
    return found


def calls_out(patched: pytest.MonkeyPatch) -> list[object]:
    """Every address that is looked up or connected to from now on, in vain."""
    asked: list[object] = []

    def refuse(*address: object) -> NoReturn:
        asked.append(address)
        raise OSError("not in a test")

    patched.setattr("socket.getaddrinfo", refuse)
    patched.setattr("socket.socket.connect", refuse)
    return asked
