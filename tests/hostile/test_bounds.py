"""What is refused takes little memory and time, measured where nothing else is: in a process with both limited.

The tests beside this one look at the words; a wait, or what is taken and given back, is seen here alone.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from core_training.data.records import read_records
from core_training.foundation.bounded_reading import ForeignTextError, parse_json, parse_yaml
from core_training.foundation.errors import FedloomError
from core_training.recipe.reading import parse_recipe
from strategies.messages import Envelope, TrainOrder
from tests.hostile import test_data_files as files
from tests.hostile import test_text as texts

SECONDS = 20.0
"""Of the clock on the wall, for one input; most take a thousandth, and other processes share the cores."""
MEMORY = {"written": 500 * 2**20, "data_files": 2**30}
"""Bytes of address space beyond what the process has with all its libraries; a packed list is 256 MiB, and its text."""
Read = Callable[[], object]


def yaml_texts(_: Path) -> Iterator[tuple[str, Read]]:
    for name, text in texts.YAML.items():
        yield name, lambda text=text: parse_recipe(text, "recipe")  # type: ignore[misc]
    colliding = "\n".join(f"{number * (2**61 - 1)}: a" for number in range(1, 20_000))
    yield "keys that collide", lambda: parse_yaml(colliding)


def json_texts(_: Path) -> Iterator[tuple[str, Read]]:
    for name, text in texts.JSON_TEXTS.items():
        if name not in ("a word", "a list", "a number"):
            yield name, lambda text=text: parse_json(text)  # type: ignore[misc]
        yield f"{name}, a message", lambda text=text: TrainOrder.open(Envelope("train", text))  # type: ignore[misc]


def fields(_: Path) -> Iterator[tuple[str, Read]]:
    for kind, right in texts.RIGHT.items():
        for name, value in texts.BAD_FIELDS.items():
            for field in right:
                if not texts.may_be(kind, field, name):
                    others = json.dumps({key: one for key, one in right.items() if key != field})[:-1]
                    text = others + (", " if others != "{" else "") + f'"{field}": {value}' + "}"
                    yield f"{kind.__name__}.{field}: {name}", lambda kind=kind, text=text: texts.opened(kind, text)  # type: ignore[misc]


def data_files(folder: Path) -> Iterator[tuple[str, Read]]:
    named = {**files.LINES, **{name: ("x.jsonl", files.bytes_of(text)) for name, text in files.JSON_LINES.items()}}
    pipes = {f"a pipe: {kind}": (kind, os.mkfifo) for kind in files.KINDS}
    for number, (name, (file, put)) in enumerate({**named, **pipes}.items()):
        if name == "packed empty lines":  # a gigabyte of them, one by one
            continue
        (folder / str(number)).mkdir()
        put(folder / str(number) / file)
        yield name, lambda path=folder / str(number) / file: [None for _ in read_records(path)]  # type: ignore[misc]


def written(folder: Path) -> Iterator[tuple[str, Read]]:
    """Texts: YAML, JSON, messages."""
    return chain(yaml_texts(folder), json_texts(folder), fields(folder))


GROUPS = {group.__name__: group for group in (written, data_files)}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_refused_takes_little_memory_and_time(tmp_path: Path, group: str) -> None:
    command = [sys.executable, "-m", "tests.hostile.test_bounds", group, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["tried"] > 10
    assert said["wrong"] == {}


def what_is_wrong(read: Read) -> str | None:
    """What a read did but refuse its input in time."""
    began = time.monotonic()
    try:
        read()
    except (FedloomError, ForeignTextError):
        seconds = time.monotonic() - began
        return f"took {seconds:.1f} s" if seconds > SECONDS else None
    except BaseException as error:
        return type(error).__name__
    return "was taken"


def main() -> None:
    reads = list(GROUPS[sys.argv[1]](Path(sys.argv[2])))
    for _, read in reads[:1]:  # what a first call loads is no input's
        what_is_wrong(read)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY[sys.argv[1]],) * 2)
    found = {name: what_is_wrong(read) for name, read in reads}
    wrong = {name: what for name, what in found.items() if what is not None}
    print(json.dumps({"tried": len(reads), "wrong": wrong}))


if __name__ == "__main__":
    main()
