"""Wall clocks of single processes, which can be set: a library that a world's processes load before all others."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")


class Clocks:
    """The clocks of all processes that are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        library = folder / "clock.so"
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "FAULTS_CLOCKS": str(folder)}

    def move(self, processes: Collection[int], seconds: int) -> None:
        """Set these processes' clocks ahead by so many seconds (0: right)."""
        for process in processes:
            (self._folder / str(process)).write_text(str(seconds))
