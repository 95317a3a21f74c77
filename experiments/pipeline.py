"""A pipeline as its file says it: named steps in order, what each refers to, and the gates after it. Runs nothing.

`${NAME}` stands for the folder of an earlier step, in any text of a step; `$${NAME}` for the characters `${NAME}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import shortened, shortened_text
from core_training.foundation.errors import InputError
from experiments.documents import check_keys, each_text, load_mapping, mapping_at, nearest
from experiments.gates import Gate, parse_gate
from experiments.steps import STEP_KINDS
from experiments.steps.step import Step

_REFERENCE = re.compile(r"(?P<escaped>\$\$\{[^{}]*\})|\$\{(?P<name>[^{}]*)\}")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,60}")


@dataclass(frozen=True)
class PlannedStep:
    """A step, the names of those that it refers to, and its gates."""

    step: Step
    after: tuple[str, ...]
    gates: tuple[Gate, ...]

    @property
    def name(self) -> str:
        return self.step.name


@dataclass(frozen=True)
class Pipeline:
    """The steps in their order; `folder` holds a folder for each."""

    source: Path
    folder: Path
    steps: tuple[PlannedStep, ...]

    def named(self, name: str, option: str) -> PlannedStep:
        """The step of that name. Raises InputError, with the option's name, where there is none."""
        for planned in self.steps:
            if planned.name == name:
                return planned
        raise InputError(f"{option}: there is no step '{shortened_text(name, 60)}'; {nearest(name, self._names)}")

    @property
    def _names(self) -> list[str]:
        return [planned.name for planned in self.steps]


def load_pipeline(path: Path, folder: Path | None = None) -> Pipeline:
    """Read a pipeline's file; `folder` is in place of its `output`. Raises InputError for what is wrong with it."""
    document = load_mapping(path, "pipeline")
    check_keys(document, ("steps", "output"), f"{path}: ")
    output = document.get("output", f"runs/{path.stem}")
    if not isinstance(output, str) or not output:
        raise InputError(f"{path}: output: name a folder, not {shortened(output)}")
    folder = folder or Path(output).expanduser()
    steps = mapping_at(document, "steps", f"{path}: ")
    if not steps:
        raise InputError(f"{path}: steps: name at least one, such as `sft: {{recipe: sft.yaml}}`")
    try:
        _check_order(steps)
        return Pipeline(path, folder, tuple(_planned(steps, folder, path.parent)))
    except InputError as error:
        said = str(error)
        raise InputError(said if str(path) in said else f"{path}: {said}") from None


def _planned(steps: Mapping[str, Any], folder: Path, home: Path) -> Iterator[PlannedStep]:
    made: dict[str, Step] = {}
    for name, document in steps.items():
        gates = tuple(
            parse_gate(figure, text, f"steps.{name}.gates.{figure}")
            for figure, text in mapping_at(document, "gates", f"steps.{name}.").items()
        )
        settings = each_text({key: value for key, value in document.items() if key != "gates"}, _in_folder(folder))
        made[name] = step = _kind(name, document)(name, settings, folder / name, home)
        for gate in gates:
            _check_gate(gate, step, made)
        yield PlannedStep(step, tuple(dict.fromkeys(_references(document))), gates)


def _kind(name: str, document: Mapping[str, Any]) -> type[Step]:
    options = {option for key in document if key in STEP_KINDS for option in STEP_KINDS[key].KEYS}
    kinds = [key for key in document if key in STEP_KINDS and key not in options]
    if len(kinds) != 1:
        said = "is of two kinds" if kinds else "says not what it does"
        raise InputError(f"steps.{name}: it {said}; give it one of {', '.join(STEP_KINDS)}")
    return STEP_KINDS[kinds[0]]


def _in_folder(folder: Path) -> Any:
    def place(found: re.Match[str]) -> str:
        return found["escaped"][1:] if found["escaped"] else str(folder / found["name"])

    return lambda text: _REFERENCE.sub(place, text)


def _references(value: Any) -> Iterator[str]:
    """The names in `${…}` in the texts of a value."""
    found: list[str] = []

    def note(text: str) -> str:
        found.extend(one["name"] for one in _REFERENCE.finditer(text) if not one["escaped"])
        return text

    each_text(value, note)
    yield from found


def _check_order(steps: Mapping[str, Any]) -> None:
    """Raise InputError for a name that is none, and for a step that refers to one that is not before it."""
    refers: dict[str, list[str]] = {}
    for name, document in steps.items():
        if not _NAME.fullmatch(name):
            said = shortened_text(name, 60)
            raise InputError(f"steps: '{said}' is no name; it begins with a letter, then letters, digits, '_' and '-'")
        if not isinstance(document, dict):
            raise InputError(
                f"steps.{name}: a step is a mapping, such as {{recipe: sft.yaml}}, not {shortened(document)}"
            )
        refers[name] = list(_references(document))
    for name, others in refers.items():
        before = list(refers)[: list(refers).index(name)]
        for other in others:
            if other in before:
                continue
            if other not in refers:
                hint = f"{nearest(other, before)} (write $${{{other}}} for the characters)"
                raise InputError(f"steps.{name}: ${{{other}}} is no step; {hint}")
            if circle := _circle(name, other, refers):
                raise InputError(f"steps.{name}: steps refer to each other in a circle: {' → '.join(circle)}")
            raise InputError(f"steps.{name}: ${{{other}}} comes after it; put step '{other}' before step '{name}'")


def _circle(name: str, other: str, refers: Mapping[str, list[str]]) -> list[str]:
    """The way from a step by way of another back to itself; empty where there is none."""
    ways = [[name, other]]
    seen = set()
    while ways:
        way = ways.pop()
        if way[-1] == name:
            return way
        if way[-1] not in seen:
            seen.add(way[-1])
            ways += [[*way, following] for following in refers.get(way[-1], [])]
    return []


def _check_gate(gate: Gate, step: Step, made: Mapping[str, Step]) -> None:
    place = f"{step.place}gates.{gate.figure}"
    if not step.FIGURES:
        raise InputError(f"{place}: step '{step.name}' leaves no figures; put the gate after one that trains")
    step.check_figure(gate.figure, place)
    if gate.step is None:
        return
    if gate.step not in made or gate.step == step.name:
        before = [name for name in made if name != step.name]
        raise InputError(f"{place}: '{gate.text}': '{gate.step}' is no step before it; {nearest(gate.step, before)}")
    if not made[gate.step].FIGURES:
        raise InputError(f"{place}: '{gate.text}': step '{gate.step}' leaves no figures")
