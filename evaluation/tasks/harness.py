"""Task files of lm-evaluation-harness on data of one's own: what is understood of them; the rest is refused by name.

Understood are `multiple_choice`, `generate_until` and `loglikelihood` tasks without examples before the question, with
columns' names or Jinja in `doc_to_text`, `doc_to_choice` and `doc_to_target`. No code of a task is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core_training.foundation.bounded_reading import BoundedLoader, shortened
from core_training.foundation.errors import InputError
from evaluation.tasks.templates import Templates

KEYS = ("doc_to_text", "doc_to_choice", "doc_to_target")
_KNOWN = (
    *("task", "task_alias", "tag", "metadata", "version", "dataset_path", "dataset_name", "dataset_kwargs"),
    *("output_type", "training_split", "validation_split", "test_split", "fewshot_split", "num_fewshot"),
    *("description", "target_delimiter", "fewshot_delimiter", "metric_list", "generation_kwargs", "filter_list"),
    *("repeats", "should_decontaminate", "doc_to_decontamination_query", *KEYS),
)
_FILES = ("json", "csv", "parquet", "text", "arrow")
_METRICS = {
    "multiple_choice": {"acc": "accuracy", "acc_norm": "accuracy_per_character"},
    "generate_until": {},
    "loglikelihood": {"perplexity": "perplexity_per_item"},
}
_OTHERS = {
    "f1": "there it is that of label 1 alone; leave it out, and ask for the mean over labels with --metrics macro_f1",
    "exact_match": "there texts are compared as they are, here up to white space; leave metric_list out for ours",
}
"""Metrics whose name is that of another figure here."""
_OWN = "exact_match"
_OF_OURS = "exact_match is up to white space here; lm-evaluation-harness compares texts as they are"
_AGGREGATIONS = {"perplexity": "perplexity"}
_MAX_TOKENS = 256
_STOP = ("\n\n",)
"""The harness's own, where a task says nothing."""


class Loader(BoundedLoader):
    """YAML in which `!function` is told from a text: it is Python code."""


@dataclass(frozen=True)
class Code:
    """A function that a task names."""

    name: str


def _code(loader: yaml.SafeLoader, node: yaml.Node) -> Code:
    return Code(str(loader.construct_scalar(node)) if isinstance(node, yaml.ScalarNode) else "")


Loader.add_constructor("!function", _code)


@dataclass(frozen=True)
class HarnessTask:
    """What is understood of a task file."""

    name: str
    data: list[str]
    templates: Templates
    metrics: tuple[str, ...]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    notes: tuple[str, ...] = ()


def is_harness(document: Mapping[str, Any]) -> bool:
    """Whether a task file is one of the harness's."""
    return any(key in document for key in ("output_type", "dataset_path", *KEYS))


def read_harness(document: Mapping[str, Any], path: Path) -> HarnessTask:
    """Understand a task file. Raises InputError naming each key that is not supported, and its value."""
    for key, value in document.items():
        if isinstance(value, Code):
            raise _refused(path, key, f"!function {value.name} is Python code, which is not run; write Jinja")
        if key not in _KNOWN:
            raise _refused(path, str(key), "it is not supported")
    kind = document.get("output_type", "generate_until")
    if kind not in _METRICS:
        raise _refused(path, "output_type", f"'{kind}' is none of {', '.join(_METRICS)}")
    if document.get("num_fewshot"):
        raise _refused(path, "num_fewshot", f"{document['num_fewshot']}: examples before a question are not supported")
    if document.get("repeats", 1) != 1:
        raise _refused(path, "repeats", "samples are asked for with --samples")
    if document.get("dataset_name") is not None:
        raise _refused(path, "dataset_name", "a data set's part has no name where its files are local")
    _check_filters(document.get("filter_list"), path)
    text, target = document.get("doc_to_text"), document.get("doc_to_target")
    if not isinstance(text, str):
        raise _refused(path, "doc_to_text", f"{shortened(text)} must be a column's name or a template")
    if not isinstance(target, str | int):
        raise _refused(path, "doc_to_target", f"{shortened(target)} must be a column's name, a template or a number")
    choices = document.get("doc_to_choice")
    if (kind == "multiple_choice") != (choices is not None):
        raise _refused(path, "doc_to_choice", "multiple_choice needs it, and nothing else does")
    templates = Templates(
        text,
        choices,
        target,
        before=str(document.get("description") or ""),
        delimiter=str(document.get("target_delimiter", " ")),
        keys=KEYS,
        is_counting=True,
    )
    return HarnessTask(
        str(document.get("task") or path.stem),
        _data(document, path),
        templates,
        _metrics(document.get("metric_list"), kind, path),
        notes=(_OF_OURS,) if kind == "generate_until" else (),
        **(_generation(document.get("generation_kwargs") or {}, path) if kind == "generate_until" else {}),
    )


def _refused(path: Path, key: str, why: str) -> InputError:
    return InputError(f"{path}: {key}: {why} (of lm-evaluation-harness's task files docs/evaluation.md has the subset)")


def _check_filters(filters: Any, path: Path) -> None:
    for one in filters or []:
        steps = one.get("filter", []) if isinstance(one, Mapping) else [one]
        for step in steps:
            name = step.get("function") if isinstance(step, Mapping) else step
            if name != "take_first":
                raise _refused(path, "filter_list", f"{shortened(name)} is not supported")


def _metrics(listed: Any, kind: str, path: Path) -> tuple[str, ...]:
    known = _METRICS[kind]
    if listed is None:
        return tuple(known.values()) or (_OWN,)
    found = []
    for one in listed if isinstance(listed, list) else [listed]:
        name = one.get("metric") if isinstance(one, Mapping) else one
        if not isinstance(name, str) or name not in known:
            if isinstance(name, str) and name in _OTHERS:
                raise _refused(path, "metric_list", f"{name}: {_OTHERS[name]}")
            said = f"!function {name.name}" if isinstance(name, Code) else shortened(name)
            raise _refused(path, "metric_list", f"{said} is none of {', '.join(known) or 'those'} of {kind}")
        more = (
            {
                key: value
                for key, value in one.items()
                if key not in ("metric", "aggregation", "higher_is_better") and value not in (None, False, [])
            }
            if isinstance(one, Mapping)
            else {}
        )
        if more:
            raise _refused(path, "metric_list", f"{name}: {', '.join(more)} is not supported")
        if isinstance(one, Mapping) and "aggregation" in one and one["aggregation"] != _AGGREGATIONS.get(name, "mean"):
            raise _refused(path, "metric_list", f"{name}: aggregation {shortened(one['aggregation'])} is not supported")
        found.append(known[name])
    return tuple(found)


def _generation(said: Mapping[str, Any], path: Path) -> dict[str, Any]:
    for key in said:
        if key not in ("until", "max_gen_toks", "do_sample", "temperature"):
            raise _refused(path, f"generation_kwargs.{key}", "it is not supported")
    until = said.get("until", _STOP)
    stop = (until,) if isinstance(until, str) else tuple(str(one) for one in until)
    temperature = float(said.get("temperature", 0.0)) if said.get("do_sample") else 0.0
    return {"max_tokens": int(said.get("max_gen_toks", _MAX_TOKENS)), "stop": stop, "temperature": temperature}


def _data(document: Mapping[str, Any], path: Path) -> list[str]:
    """The files of the part that is evaluated on; a relative path is one of the task file's folder, or of this one."""
    source = document.get("dataset_path")
    files = (document.get("dataset_kwargs") or {}).get("data_files")
    if source not in _FILES:
        place = path.parent / str(source)
        if source is None or not place.exists():
            raise _refused(
                path,
                "dataset_path",
                f"'{source}' is no local data; name files by dataset_path: json, dataset_kwargs: {{data_files: …}}",
            )
        files = str(place)
    splits = [document.get(f"{part}_split") for part in ("test", "validation", "training")]
    if isinstance(files, Mapping):
        chosen = next((split for split in splits if split in files), None)
        if chosen is None:
            named = ", ".join(map(str, files))
            raise _refused(path, "test_split", f"{shortened(splits[0])} is none of the data's parts: {named}")
        files = files[chosen]
    listed = [files] if isinstance(files, str) else files
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(one, str) for one in listed):
        raise _refused(path, "dataset_kwargs.data_files", "it names the local files, as a path, a list, or by split")
    return [near(path, one) for one in listed]


def near(path: Path, name: str) -> str:
    """A path beside the file that names it; one of the present folder, where only that is there."""
    beside = path.parent / name
    return name if not beside.exists() and Path(name).exists() else str(beside)


def load_yaml(path: Path) -> Any:
    """The value of a task file. Raises InputError."""
    from core_training.foundation.bounded_reading import ForeignTextError, read_yaml, reason_of

    try:
        return read_yaml(path, Loader)
    except (OSError, ForeignTextError, yaml.YAMLError) as error:
        said = reason_of(error) if isinstance(error, OSError | ForeignTextError) else str(error)
        raise InputError(f"{path}: {said}") from None
