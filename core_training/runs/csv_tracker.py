"""The curve as a table, `curve.csv`: for those who ask for it, in accelerate's form of a tracker."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from accelerate.tracking import GeneralTracker

from core_training.foundation.durable import commit_file
from core_training.runs.curve import Row
from core_training.runs.run_folder import RunFolder


class CsvTracker(GeneralTracker):  # type: ignore[misc]  # accelerate has no types
    """Writes the whole table whenever a run ends, fails or is interrupted: its columns are known only then."""

    name = "csv"
    requires_logging_directory = False

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self._folder = folder

    @property
    def tracker(self) -> RunFolder:
        return self._folder

    def finish(self) -> None:
        """Write the table. Raises RunError when the disk refuses."""
        commit_file(self._folder.path / "curve.csv", table_of(self._folder.curve()).encode())


def table_of(rows: Sequence[Row]) -> str:
    """Rows as comma-separated values, with a column for each name that one of them has; empty where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
