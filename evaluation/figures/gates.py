"""Gates: what a model must reach to go on, in a file of its own; read, tried, and told as JUnit XML. Pure but reading.

`accuracy: ">= base + 0.02"`, `loss: "<= 1.5"`, `loss.worst_site: "<= base"`, `accuracy: ">= base, significant"`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from core_training.foundation.bounded_reading import ForeignTextError, read_yaml, reason_of, shortened
from core_training.foundation.errors import InputError
from evaluation.figures.comparisons import paired
from evaluation.figures.metrics import WITHOUT_INTERVALS, metric
from evaluation.figures.results import Result, worst
from evaluation.figures.statistics import holm
from evaluation.items import Task

_SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": lambda value, bound: value >= bound - _ROUNDING,
    "<=": lambda value, bound: value <= bound + _ROUNDING,
    ">": lambda value, bound: value > bound + _ROUNDING,
    "<": lambda value, bound: value < bound - _ROUNDING,
}
_ROUNDING = 1e-12
"""What sums such as 0.5 + 0.02 are off by."""
_NUMBER = r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
_TERM = re.compile(
    rf"\s*(?P<sign>>=|<=|>|<)\s*(?:(?P<base>base)(?:\s*(?P<plus>[-+])\s*(?P<margin>{_NUMBER}))?|(?P<number>-?(?:{_NUMBER})))"
    r"(?P<significant>\s*,\s*significant)?\s*"
)
_FORM = '">= 0.6", ">= base + 0.02", "<= base", or one of them with ", significant" behind it'
_ALPHA = "alpha"
_WORST = "worst_"


@dataclass(frozen=True)
class Gate:
    """One gate: a metric (of its worst group, where a `column` is named), a sign and what it is held against.

    `task` None means every task that has the metric.
    """

    key: str
    metric: str
    sign: str
    number: float
    of_base: bool
    significant: bool
    column: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Gates:
    """The gates of a file, and the p below which a difference is significant."""

    gates: tuple[Gate, ...]
    alpha: float = 0.05

    @property
    def need_base(self) -> bool:
        return any(gate.of_base for gate in self.gates)

    @property
    def columns(self) -> list[str]:
        """The columns whose worst groups are asked for."""
        return list(dict.fromkeys(gate.column for gate in self.gates if gate.column is not None))

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise InputError for a gate that is held against what no task measures, before anything is asked."""
        for gate in self.gates:
            own = [task for task in tasks if gate.task in (None, task.name)]
            if not any(gate.metric in task.metrics for task in own):
                known = ", ".join(dict.fromkeys(name for task in own or tasks for name in task.metrics))
                where = "no task measures it" if own else f"there is no task '{gate.task}'"
                raise InputError(f"--gates: {gate.key}: {where}; there are {known}")


@dataclass(frozen=True)
class Verdict:
    """What became of a gate for one model on one task. `p` is adjusted by Holm over the file's significant gates."""

    gate: Gate
    model: str
    task: str
    passed: bool
    words: str
    p: float | None = None

    def document(self) -> dict[str, Any]:
        return {
            "gate": self.gate.key,
            "model": self.model,
            "task": self.task,
            "passed": self.passed,
            "says": self.words,
            "p_holm": self.p,
        }


def read_gates(path: Path) -> Gates:
    """The gates of a file. Raises InputError naming the key, its value and what would be right."""
    try:
        document = read_yaml(path)
    except (OSError, ForeignTextError) as error:
        raise InputError(f"--gates: {path}: {reason_of(error)}") from None
    if not isinstance(document, Mapping) or not document:
        raise InputError(
            f'--gates: {path}: it is a mapping of metrics to what they must be, such as accuracy: ">= 0.6"'
        )
    alpha = document.get(_ALPHA, 0.05)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise InputError(f"--gates: {path}: alpha: {shortened(alpha)} must be a number between 0 and 1")
    gates = tuple(_gate(path, str(key), value) for key, value in document.items() if key != _ALPHA)
    if not gates:
        raise InputError(f"--gates: {path}: it names no metric")
    return Gates(gates, float(alpha))


def _gate(path: Path, key: str, value: Any) -> Gate:
    found = _TERM.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise InputError(f"--gates: {path}: {key}: {shortened(value)} is no condition; write {_FORM}")
    task, slash, name = key.rpartition("/")
    name, _, place = name.partition(f".{_WORST}")
    try:
        metric(name)
    except InputError as error:
        raise InputError(f"--gates: {path}: {key}: {str(error).removeprefix('metrics: ')}") from None
    margin = float(found["margin"] or 0) * (-1 if found["plus"] == "-" else 1)
    of_base, significant = found["base"] is not None, found["significant"] is not None
    if significant and (place or not of_base):
        raise InputError(f"--gates: {path}: {key}: 'significant' goes with base, and with a figure over all items")
    if significant and name in WITHOUT_INTERVALS:
        raise InputError(
            f"--gates: {path}: {key}: {name} has no interval to tell a difference by; leave ', significant' out"
        )
    number = margin if of_base else float(found["number"])
    return Gate(key, name, found["sign"], number, of_base, significant, place or None, task if slash else None)


def tried(gates: Gates, results: Sequence[Result], models: Sequence[str], base: str | None) -> list[Verdict]:
    """Each gate for each of the models. Raises InputError where a gate asks for what nobody measured."""
    if gates.need_base and base is None:
        gate = next(gate for gate in gates.gates if gate.of_base)
        raise InputError(f"--gates: {gate.key}: it is held against base; name that model with --against")
    by_key = {(result.model, result.task): result for result in results}
    verdicts: list[Verdict] = []
    for gate in gates.gates:
        own = [r for r in results if r.model in models and gate.task in (None, r.task) and gate.metric in r.figures]
        if not own:
            known = ", ".join(dict.fromkeys(name for result in results for name in result.document["metrics"]))
            raise InputError(f"--gates: {gate.key}: no task measured it; there are {known}")
        verdicts += [_tried(gate, result, by_key.get((base or "", result.task))) for result in own]
    tested = [number for number, one in enumerate(verdicts) if one.gate.significant]
    adjusted = holm([verdicts[number].p or 0.0 for number in tested])
    for number, p in zip(tested, adjusted, strict=True):
        one = verdicts[number]
        said = f"p {p:.4g} by Holm over {len(tested)}"
        passed = one.passed and p < gates.alpha
        verdicts[number] = replace(one, p=p, passed=passed, words=f"{one.words}, {said}")
    return verdicts


def _tried(gate: Gate, result: Result, base: Result | None) -> Verdict:
    ours, is_told = _value(gate, result)
    bound, words = gate.number, ""
    if gate.of_base:
        theirs, theirs_told = (None, True) if base is None else _value(gate, base)
        bound = math.nan if theirs is None else theirs + gate.number
        words = f" (base {_shown(theirs)})"
        is_told = is_told and theirs_told
    passed = ours is not None and bool(_SIGNS[gate.sign](ours, bound))
    p = None
    if gate.significant and base is not None:
        # Without an interval there is nothing to tell a difference by.
        found = paired(result.figures[gate.metric], base.figures[gate.metric]).p
        p = 1.0 if math.isnan(found) else found
    said = f"{gate.key} is {_shown(ours)}, must be {gate.sign} {_shown(bound)}{words}"
    if not is_told:
        said = f"{gate.key} was tried over all groups; the worst is one of those that are not told (--suppress-below)"
    return Verdict(gate, result.model, result.task, passed, said, p)


def _value(gate: Gate, result: Result) -> tuple[float | None, bool]:
    """The figure that a gate is of, and whether it may be told."""
    if gate.column is not None:
        return worst(result, gate.metric, gate.column, largest=gate.sign.startswith("<")) or (None, True)
    told = result.document["metrics"].get(gate.metric)
    return None if told is None else float(told["value"]), True


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def junit(verdicts: Sequence[Verdict]) -> bytes:
    """The verdicts as JUnit XML: a test case each, failures with what was found."""
    failed = sum(not one.passed for one in verdicts)
    suite = ElementTree.Element("testsuite", name="fedloom evaluate", tests=str(len(verdicts)), failures=str(failed))
    for one in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{one.model}.{one.task}", name=one.gate.key)
        if not one.passed:
            ElementTree.SubElement(case, "failure", message=one.words).text = one.words
    whole = ElementTree.Element("testsuites", tests=str(len(verdicts)), failures=str(failed))
    whole.append(suite)
    ElementTree.indent(whole)
    text: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return text + b"\n"
