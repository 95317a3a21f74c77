"""Memory that is freed goes back to the system where that is asked for, and stays with the process otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.recipe.schema import Recipe

PROGRAM = """
import sys
import core_training.foundation.environment
import torch
from core_training.foundation.heap import give_back_freed_memory

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) >> 10

for wanted in map(bool, map(int, sys.argv[1])):
    give_back_freed_memory(wanted=wanted)
torch.ones(20 << 18)  # freed: glibc keeps blocks of up to this size from now on, unless it was told otherwise
tensors = []
for _ in range(30):
    tensors += [torch.ones(4 << 18), torch.ones(1 << 14)]  # 4 MB, and a little that stays
before = held()
del tensors[::2]
print(before - held())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they will")
@pytest.mark.parametrize(("asked", "goes_back"), [("", False), ("1", True), ("0", False), ("10", False), ("101", True)])
def test_freed_memory_goes_back_where_it_is_wanted(asked: str, goes_back: bool) -> None:
    told = subprocess.run([sys.executable, "-c", PROGRAM, asked], capture_output=True, text=True, check=True)
    assert (int(told.stdout) > 100) is goes_back  # MB, of 120


PREPARING = """
import sys
from pathlib import Path
from core_training.engine.engine import open_engine
from core_training.foundation import heap
from core_training.models.libraries import own_the_process
from core_training.recipe.reading import load_recipe

if sys.argv[2] == "ours":
    own_the_process()
for checkpoints in ("true", "false"):
    open_engine(load_recipe(Path(sys.argv[1]), [f"training.gradient_checkpointing={checkpoints}"])).launch()
    print(heap._is_set)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they will")
@pytest.mark.parametrize(("whose", "told"), [("ours", "True\nFalse\n"), ("a person's", "False\nFalse\n")])
def test_checkpointing_wants_it_in_processes_of_ours(
    make_recipe: Callable[..., Recipe], tmp_path: Path, whose: str, told: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(make_recipe().to_yaml())
    command = [sys.executable, "-c", PREPARING, str(tmp_path / "recipe.yaml"), whose]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == told
