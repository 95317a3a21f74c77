"""A report of Evidently on answers: `python -I evidently_report.py REQUEST.json FOLDER`, in Evidently's environment.

It knows nothing of fedloom: it reads a request in JSON, and writes report.html and report.json, which are Evidently's,
and outcome.json, which says what became of the named tests and which versions there were.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import evidently
import pandas
from evidently import DataDefinition, Dataset, Report
from evidently.descriptors import ExactMatch, RegExp, TextLength, WordCount
from evidently.metrics import CategoryCount, MaxValue, MeanValue, MedianValue, MinValue, ValueDrift
from evidently.presets import TextEvals
from evidently.tests import gt, gte, lt, lte

COMPARISONS = {">=": gte, "<=": lte, ">": gt, "<": lt}
STATISTICS = {"mean": MeanValue, "median": MedianValue, "min": MinValue, "max": MaxValue}


def descriptor(wanted: dict[str, Any]) -> Any:
    """The descriptor of Evidently's that a request names."""
    name = wanted["name"]
    if wanted["kind"] == "exact_match":
        return ExactMatch(columns=["answer", "expected"], alias=name)
    if wanted["kind"] == "regex":
        return RegExp("answer", reg_exp=wanted["pattern"], alias=name)
    return {"length": TextLength, "words": WordCount}[wanted["kind"]]("answer", alias=name)


def dataset(rows: list[dict[str, Any]], request: dict[str, Any]) -> Any:
    """Rows with their descriptors; what came as a figure of each answer stands beside them."""
    definition = DataDefinition(
        text_columns=["prompt", "answer", "expected"],
        categorical_columns=request["given"],
        id_column="id",
    )
    frame = pandas.DataFrame(rows)
    return Dataset.from_pandas(frame, definition, [descriptor(one) for one in request["descriptors"]])


def drift(column: str, request: dict[str, Any], tests: list[Any] | None = None) -> Any:
    """How far apart candidate and reference lie in a column: a distance, of which more is more."""
    method = request["drift"]["categorical" if column in request["shares"] else "numerical"]
    return ValueDrift(column=column, method=method, threshold=request["drift"]["threshold"], tests=tests)


def own_figure(column: str, statistic: str, data: Any, request: dict[str, Any]) -> float:
    """A column's figure, for a test that is held against the reference's."""
    values = data.as_dataframe()[column].astype(float)
    return float(values.mean() if column in request["shares"] else getattr(values, statistic)())


def tested(test: dict[str, Any], reference: Any, request: dict[str, Any]) -> tuple[Any, float]:
    """The metric of a named test, and the threshold that it has."""
    column, statistic, threshold = test["column"], test["statistic"], test["value"]
    if test["is_relative"]:
        threshold += own_figure(column, statistic, reference, request)
    tests = [COMPARISONS[test["comparison"]](threshold)]
    if statistic == "drift":
        return drift(column, request, tests), threshold
    if column in request["shares"]:
        return CategoryCount(column=column, category=True, share_tests=tests), threshold
    return STATISTICS[statistic](column=column, tests=tests), threshold


def main(request_file: str, folder: str) -> None:
    """Write the report, what it says as JSON, and the outcome."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    candidate = dataset(request["candidate"], request)
    reference = dataset(request["reference"], request) if request["reference"] else None
    columns = [one["name"] for one in request["descriptors"]] + request["given"]
    metrics: list[Any] = [TextEvals(columns=columns)]
    metrics += [CategoryCount(column=column, category=True) for column in request["shares"]]
    metrics += [drift(column, request) for column in columns if reference is not None]
    pairs = [tested(test, reference, request) for test in request["tests"]]
    # With include_tests=True there would be tests that nobody named: whatever changed by a tenth would fail.
    report = Report([*metrics, *(metric for metric, _ in pairs)], include_tests=False)
    snapshot = report.run(candidate, reference)
    place = Path(folder)
    snapshot.save_html(str(place / "report.html"))
    (place / "report.json").write_text(snapshot.json(), encoding="utf-8")
    outcome = {
        "evidently": evidently.__version__,
        "pandas": pandas.__version__,
        "thresholds": [threshold for _, threshold in pairs],
    }
    (place / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
