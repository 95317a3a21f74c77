"""What `--on` names, as tasks: a file or folder of records, a TASK.yaml, a run's held-out records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from core_training.data.records import source_name
from core_training.foundation.bounded_reading import place_and_words
from core_training.foundation.errors import InputError
from core_training.parts.section import Section
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from evaluation.figures.metrics import OF_ANSWERS, OF_CHOICES, OF_LOSS, REWARD, is_own, metric
from evaluation.items import Task
from evaluation.tasks.formats import FORMATS, Read, Reading, items_of, read_items
from evaluation.tasks.harness import is_harness, load_yaml, near, read_harness
from evaluation.tasks.templates import Templates

HELD_OUT = "held-out"
"""In the place of a file: the records that the first run held out."""

USUAL = {
    "choice": OF_CHOICES,
    "answer": (*OF_LOSS, *OF_ANSWERS),
    "text": OF_LOSS,
    "rubric": ("rubric", "refusal", "ended", "answer_tokens"),
    "question": ("refusal", "ended", "answer_tokens"),
}
"""What is measured on each kind of items where nobody says."""


class TaskFile(Section):
    """The content of a TASK.yaml. Relative paths are relative to its folder."""

    name: str | None = Field(None, description="Unset: the file's name.")
    data: str | list[str] = Field(description="The records: file, glob, folder or list.")
    format: Literal[tuple(FORMATS)] | None = Field(None, description="Unset: what the first record looks like.")  # type: ignore[valid-type]
    columns: dict[str, str] = Field(default_factory=dict, description="The file's names of columns called otherwise.")
    id: str | None = Field(None, description="The column that names an item.")
    prompt: str | None = Field(None, description="A column's name, or a Jinja template of the columns.")
    system: str | None = Field(None, description="A system text before each prompt.")
    choices: str | list[str] | None = Field(None, description="A list of texts, a column's name, or a Jinja template.")
    answer: str | None = Field(None, description="What is right: a column's name, or a Jinja template.")
    label_base: Literal[0, 1] | None = Field(None, description="What numbers of choices begin with. Unset: found out.")
    missing: Literal["stop", "skip"] = Field("stop", description="What becomes of items without an answer.")
    chat: bool | None = Field(None, description="Through the chat template. Unset: where the model has one.")
    metrics: list[str] = Field(default_factory=list, description="What is measured. Unset: what fits the items.")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The longest answer.")
    temperature: Annotated[float, Field(ge=0)] | None = Field(None, description="0 takes the likeliest token.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer.")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="The first so many items.")

    @model_validator(mode="after")
    def _check_templates(self) -> TaskFile:
        if self.prompt is None and (self.choices is not None or self.answer is not None):
            raise ValueError("choices and answer go with a prompt; without one the format says what they are")
        if self.prompt is not None and self.format is not None:
            raise ValueError("name a format, or give a prompt of your own")
        if self.choices is not None and self.answer is None:
            raise ValueError("choices need an answer: the column with the number, letter or text of the right one")
        return self


@dataclass(frozen=True)
class Wanted:
    """What the command line says of all tasks; it comes before what a task says."""

    metrics: tuple[str, ...] = ()
    limit: int | None = None
    chat: bool | None = None
    reward: bool = False
    """Whether a reward model scores the answers, too."""
    run: Path | None = None
    """The first run that is evaluated: its held-out records can be asked for, and its columns' names hold."""
    columns: dict[str, str] = field(default_factory=dict)


def load_task(on: str, wanted: Wanted | None = None) -> Task:
    """The task of a file or a TASK.yaml. Raises InputError for what is wrong in it."""
    wanted = wanted or Wanted()
    for name in wanted.metrics:
        metric(name)
    path = Path(on)
    if path.suffix in (".yaml", ".yml"):
        return _of_yaml(path, wanted)
    if on == HELD_OUT and not path.exists():
        return _held_out(wanted)
    read = read_items(on, Reading(usual_columns=wanted.columns))
    name = source_name(path) if not any(sign in on for sign in "*?[") else path.stem.strip("*?") or "task"
    return _task(name, read, wanted)


def load_tasks(on: Sequence[str], models: Sequence[str], key: str, **wanted: Any) -> list[Task]:
    """The tasks of these names, for models of which the first run says how columns are called.

    Raises InputError as `load_task`, and for two of one name; `key` is where they were named.
    """
    run = next((Path(name) for name in models if (Path(name) / "recipe.yaml").is_file()), None)
    columns = dict(load_recipe(run / "recipe.yaml").data.columns) if run is not None else {}
    tasks = [load_task(one, Wanted(run=run, columns=columns, **wanted)) for one in on]
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{key}: two tasks are called '{twice}'; call one otherwise, with name in a TASK.yaml")
    return tasks


def task_of_files(name: str, files: Sequence[str], wanted: Wanted) -> Task:
    """The task of a data set's files, under its name. Raises as `load_task`."""
    return _task(name, read_items(list(files), Reading(usual_columns=wanted.columns)), wanted)


def _held_out(wanted: Wanted) -> Task:
    """The records that the first run held out."""
    if wanted.run is None:
        raise InputError(f"--on {HELD_OUT}: none of the models is a run, so nothing was held out; name a file")
    return held_out_task(load_recipe(wanted.run / "recipe.yaml"), str(wanted.run), wanted)


def held_out_task(recipe: Recipe, run: str, wanted: Wanted) -> Task:
    """The records that a run held out; its recipe names them here. Raises InputError for none, and for other stages."""
    from evaluation.tasks.run_records import held_out_records

    if recipe.stage not in ("sft", "pretrain"):
        raise InputError(
            f"--on {HELD_OUT}: the records of stage {recipe.stage} are no questions with one answer; name a file"
        )
    records = list(held_out_records(recipe))
    if not records:
        raise InputError(f"--on {HELD_OUT}: {run} held no records out (data.eval_fraction, data.eval)")
    return _task(HELD_OUT, items_of(records, run, Reading(columns=recipe.data.columns)), wanted)


def _of_yaml(path: Path, wanted: Wanted) -> Task:
    document = load_yaml(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: a task is a mapping (data, prompt, choices, answer, metrics, …)")
    if is_harness(document):
        task = read_harness(document, path)
        read = read_items(task.data, Reading(label_base=0), task.templates)
        read = replace(read, notes=(*task.notes, *read.notes))
        return _task(
            task.name, read, wanted, task.metrics, chat=False, max_tokens=task.max_tokens, stop=task.stop,
            temperature=task.temperature,
        )  # fmt: skip
    try:
        file = TaskFile.model_validate(document)
    except ValidationError as error:
        key, said = place_and_words(error)
        known = f"; known are {', '.join(TaskFile.model_fields)}" if "Extra inputs" in said else ""
        raise InputError(f"{path}: {key + ': ' if key else ''}{said}{known}") from None
    for name in file.metrics:
        metric(name)
    data = [near(path, one) for one in ([file.data] if isinstance(file.data, str) else file.data)]
    reading = Reading(file.columns, {}, file.label_base, file.missing == "skip", file.id, file.format)
    templates = None
    if file.prompt is not None:
        templates = Templates(file.prompt, file.choices, file.answer, file.system)
    read = read_items(data, reading, templates)
    own = [_beside(path, name) for name in file.metrics]
    return _task(
        file.name or path.stem, read, wanted, own, chat=file.chat, max_tokens=file.max_tokens,
        stop=tuple(file.stop), temperature=file.temperature, limit=file.limit,
    )  # fmt: skip


def _beside(path: Path, name: str) -> str:
    """A metric's name; a function's file is beside the task's."""
    file, _, function = name.rpartition(":")
    return f"{near(path, file)}:{function}" if is_own(name) and file.endswith(".py") else name


def _task(
    name: str, read: Read, wanted: Wanted, metrics: Sequence[str] = (), *, limit: int | None = None, **more: Any
) -> Task:
    chosen = dict.fromkeys([*(wanted.metrics or metrics or USUAL[read.kind]), *([REWARD] if wanted.reward else [])])
    if wanted.chat is not None:
        more["chat"] = wanted.chat
    items = read.items[: wanted.limit or limit]
    return Task(name, items, tuple(chosen), notes=read.notes, **more)
