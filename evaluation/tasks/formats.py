"""From the files that people have to items: PubMedQA, MedQA, MedMCQA, MMLU, HealthBench, conversations, plain texts.

Which one a file is, its first record says. What is odd becomes a note, what is wrong an error.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from core_training.data.formats import column_sets, read_values
from core_training.data.records import Record, data_files, read_records
from core_training.data.turns import prompt_of, tools_of, turn
from core_training.foundation.bounded_reading import ForeignTextError, check_depth, read_json, reason_of, shortened
from core_training.foundation.errors import InputError
from core_training.parts.data_kinds.values import Conversation, Messages, Text
from evaluation.items import Criterion, Item

_LETTERS = string.ascii_uppercase
_ANSWER = "Answer:"
_BY_LETTER = "Answer with the letter of the right choice alone."
_ANSWERS = ("chosen", "rejected", "completion", "margin")
_QUESTION_AND_ANSWER = {"prompt": "question", "completion": "answer"}


Sources = Mapping[Path, tuple[str, str]]


@dataclass(frozen=True)
class Reading:
    """How a file is to be read: `columns` renames, `label_base` says what numbers of choices begin with.

    `skip_unanswered` leaves out items without an answer, and counts them; else they are an error.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    usual_columns: Mapping[str, str] = field(default_factory=dict)
    """Those of a run, which hold where a file has them all."""
    label_base: int | None = None
    skip_unanswered: bool = False
    identifier: str | None = None
    format: str | None = None
    sources: Sources = field(default_factory=dict)
    """Of files that have a name in common: what their sites and their items are called by."""


@dataclass(frozen=True)
class Draft:
    """An item whose label is as the file has it; `label` None says that there is no answer.

    `is_choice` says that the label is one of the item's choices; `gold` is its number where the file leaves no doubt.
    """

    item: Item
    label: Any = None
    has_label: bool = False
    is_choice: bool = False
    gold: int | None = None


class Template(Protocol):
    """Something that makes items of records in a person's own way."""

    def draft(self, record: Record, reading: Reading) -> Draft: ...


@dataclass(frozen=True)
class Format:
    """A kind of file: `fits` looks at a record's columns, `read` makes a draft of one."""

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Record, Reading], Draft]
    kind: str


@dataclass(frozen=True)
class Read:
    """The items of files; their kind (`choice`, `answer`, `text`, `rubric`, `question`); and what is to be said."""

    items: list[Item]
    kind: str
    notes: tuple[str, ...]


def read_items(patterns: str | list[str], reading: Reading | None = None, template: Template | None = None) -> Read:
    """The items of all files, by their format or by a template.

    Raises InputError for none, for unknown columns, and for wrong labels and identifiers.
    """
    shown = patterns if isinstance(patterns, str) else ", ".join(patterns)
    records = [record for path in data_files(patterns) for record in _records(path)]
    return items_of(records, shown, reading or Reading(), template)


def items_of(records: Sequence[Record], shown: str, reading: Reading, template: Template | None = None) -> Read:
    """The items of records, which errors call `shown`. Raises as `read_items`."""
    if not records:
        raise InputError(f"{shown}: it holds no items; an evaluation needs one at least")
    reading = replace(reading, sources=told_apart({record.path: record.source for record in records}))
    if template is None:
        columns = reading.columns or _fitting(reading.usual_columns, records[0])
        records = [_renamed(record, columns) for record in records] if columns else records
        reading = replace(reading, columns=columns)
    kind = None if template is not None else _format_of(records[0], reading)
    read = kind.read if kind is not None else template.draft if template is not None else None
    assert read is not None
    drafts = [read(record, reading) for record in records]
    lacking = [draft for draft in drafts if draft.has_label and draft.label in (None, "", -1)]
    if lacking and not reading.skip_unanswered:
        raise InputError(
            f"{lacking[0].item.place}: no answer ({shortened(lacking[0].label)}); {len(lacking)} of {len(drafts)} "
            "items have none. Leave them out of the file, or set missing: skip in a TASK.yaml"
        )
    drafts = [draft for draft in drafts if draft not in lacking] if lacking else drafts
    if not drafts:
        raise InputError(f"{shown}: none of its {len(lacking)} items has an answer to compare with")
    items, notes = _labelled(drafts, reading)
    check_identifiers(items)
    if lacking:
        notes = (*notes, f"{len(lacking)} items without an answer are left out (missing: skip)")
    return Read(items, kind.kind if kind is not None else _kind_of(drafts[0]), notes)


def told_apart(names: Mapping[Path, str]) -> Sources:
    """What files are called as sites and in identifiers: by name, with as many folders before it as tell them apart.

    Parts of one data set in one folder are one site, and differ in identifiers by the file's whole name.
    """
    alike: dict[str, list[Path]] = {}
    for path, name in names.items():
        alike.setdefault(name, []).append(path)
    found = {}
    for name, paths in alike.items():
        folders = {path.parent for path in paths}
        most = max(len(folder.parts) for folder in folders)
        depths = range(most + 1) if len(folders) > 1 else range(1)
        depth = next((d for d in depths if len({_last(folder, d) for folder in folders}) == len(folders)), most)
        counts = Counter(path.parent for path in paths)
        for path in paths:
            before = _last(path.parent, depth)
            own = path.name if counts[path.parent] > 1 else name
            found[path] = ("/".join((*before, name)), "/".join((*before, own)))
    return found


def _last(folder: Path, count: int) -> tuple[str, ...]:
    return folder.parts[-count:] if count else ()


def _kind_of(draft: Draft) -> str:
    """What kind of items a template makes."""
    if draft.is_choice:
        return "choice"
    return "answer" if draft.has_label else "question"


def _records(path: Path) -> Iterator[Record]:
    """A file's records; of one JSON object by identifier, each with its own as `id`."""
    if path.suffix == ".json":
        try:
            document = read_json(path, 512 * 2**20, keys_once=True)
        except (OSError, ForeignTextError) as error:
            raise InputError(f"{path}: {reason_of(error)}") from None
        if isinstance(document, dict):
            if document and not all(isinstance(value, dict) for value in document.values()):
                raise InputError(f"{path}: a .json file holds a list of records, or an object of them by identifier")
            for number, (name, fields) in enumerate(document.items(), start=1):
                check_depth(fields)
                yield Record({"id": name, **fields}, path, number)
            return
    yield from read_records(path)


def _format_of(record: Record, reading: Reading) -> Format:
    if reading.format is not None:
        if reading.format not in FORMATS:
            raise InputError(f"format: '{reading.format}' is none of {', '.join(FORMATS)}")
        return FORMATS[reading.format]
    for kind in FORMATS.values():
        if kind.fits(record.fields):
            return kind
    known = " or ".join("+".join(columns) for columns in column_sets("sft"))
    raise InputError(
        f"{record.place}: no kind of task has these columns ({', '.join(record.fields) or 'none'}). Known are "
        "question+choices+answer (MMLU), sent1+ending0…+label (MedQA), question+opa…opd+cop (MedMCQA), "
        f"QUESTION+CONTEXTS+final_decision (PubMedQA), prompt+rubrics (HealthBench), question+answer, {known}, prompt "
        "alone, text; a TASK.yaml says how others are read"
    )


def _identifier(record: Record, reading: Reading) -> str:
    names = [reading.identifier] if reading.identifier else ["id", "prompt_id", "question_id", "pubid", "PMID"]
    for name in names:
        value = record.fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    if reading.identifier:
        raise InputError(f"{record.place}: column '{reading.identifier}' does not name the item, which id: goes by")
    _, source = reading.sources.get(record.path, (record.source, record.source))
    return f"{source}:{record.line}"


def common_parts(record: Record, reading: Reading, used: Sequence[str]) -> dict[str, Any]:
    """What every item has: identifier, place, site, and the columns that are short enough to go by."""
    plain = {
        name: value
        for name, value in record.fields.items()
        if name not in used and isinstance(value, str | int | float | bool)
    }
    site = record.fields.get("site")
    source, _ = reading.sources.get(record.path, (record.source, record.source))
    return {
        "id": _identifier(record, reading),
        "record": record,
        "site": site if isinstance(site, str) and site else source,
        "columns": plain,
    }


def _text(record: Record, name: str) -> str:
    value = record.fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{record.place}: '{name}' must be a text, not {shortened(value)}")
    return value.strip()


def _column(record: Record, name: str) -> Any:
    """What a record has in a column. Raises InputError where it has no such column."""
    if name not in record.fields:
        raise InputError(
            f"{record.place}: it has no column '{name}' (it has {', '.join(record.fields) or 'none'}); all records of "
            "a task are of the kind that the first is of"
        )
    return record.fields[name]


def _by_letter(
    record: Record, reading: Reading, question: str, choices: Sequence[Any], label: Any, gold: int | None = None
) -> Draft:
    """A question with its choices listed; the letters are scored."""
    if (
        len(choices) < 2
        or len(choices) > len(_LETTERS)
        or not all(isinstance(one, str | int | float) for one in choices)
    ):
        raise InputError(f"{record.place}: an item has 2 to {len(_LETTERS)} choices, which are texts")
    letters = _LETTERS[: len(choices)]
    listed = "\n".join(f"{letter}. {str(one).strip()}" for letter, one in zip(letters, choices, strict=True))
    body = f"{question}\n{listed}"
    used = (
        "question",
        "choices",
        "answer",
        "sent1",
        "sent2",
        "label",
        "options",
        "answer_idx",
        "answer_index",
        "cop",
        "opa",
        "opb",
        "opc",
        "opd",
        "exp",
    )
    item = Item(
        **common_parts(record, reading, used),
        prompt=[turn("user", f"{body}\n{_BY_LETTER}")],
        plain=f"{body}\n{_ANSWER}",
        bare=question,
        choices=tuple(letters),
        labels=tuple(letters),
        references=tuple(str(one).strip() for one in choices),
    )
    return Draft(item, label, has_label=True, is_choice=True, gold=gold)


def _pubmedqa(record: Record, reading: Reading) -> Draft:
    fields = {name.lower(): value for name, value in record.fields.items()}
    contexts = fields.get("contexts", fields.get("context"))
    if isinstance(contexts, dict):
        contexts = contexts.get("contexts")
    contexts = [contexts] if isinstance(contexts, str) else contexts
    question = fields.get("question")
    if not isinstance(question, str) or not isinstance(contexts, list) or not all(isinstance(c, str) for c in contexts):
        raise InputError(f"{record.place}: PubMedQA has a text QUESTION and a list of texts CONTEXTS")
    body = f"Abstract: {' '.join(contexts)}\nQuestion: {question.strip()}"
    base = common_parts(record, reading, ("QUESTION", "question", "final_decision", "LONG_ANSWER", "long_answer"))
    choices = ("yes", "no", "maybe")
    label = fields.get("final_decision")
    return Draft(
        Item(
            **base,
            prompt=[turn("user", f"{body}\nAnswer yes, no or maybe.")],
            plain=f"{body}\n{_ANSWER}",
            bare=question.strip(),
            choices=choices,
            labels=choices,
        ),
        label.strip().lower() if isinstance(label, str) else label,
        has_label=True,
        is_choice=True,
    )


def _medqa(record: Record, reading: Reading) -> Draft:
    endings = [record.fields[f"ending{n}"] for n in range(26) if f"ending{n}" in record.fields]
    question = " ".join(filter(None, (_text(record, "sent1"), str(record.fields.get("sent2") or "").strip())))
    return _by_letter(record, reading, question, endings, record.fields.get("label"))


def _options(record: Record, reading: Reading) -> Draft:
    """MedQA as its authors publish it, options by letter; or MMLU-Pro, a list of them with a letter and a number."""
    letters, texts = _lettered(record)
    names = [name for name in ("answer_idx", "answer_index", "answer") if record.fields.get(name) not in (None, "")]
    found: dict[str, int] = {}
    for name in names:
        label = record.fields[name]
        if name == "answer" and found and label not in [*letters, *_LETTERS, *texts]:
            continue  # the text in other words, beside a letter
        at = texts.index(label) if name == "answer" and label in texts else _among(record, letters, name)
        if at is None and name == "answer_index" and 0 <= (_number(label) or 0) < len(texts):
            at = _number(label)  # MMLU-Pro counts from 0, and has the letter beside
        if at is not None:
            found[name] = at
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} {shortened(record.fields[name])}" for name in found)
        raise InputError(f"{record.place}: {said} are different choices")
    label = record.fields[names[0]] if names else None
    return _by_letter(record, reading, _text(record, "question"), texts, label, next(iter(found.values()), None))


def _lettered(record: Record) -> tuple[list[Any], list[Any]]:
    """The letters and the texts of a record's options. Raises InputError for options in no known form."""
    options = _column(record, "options")
    if isinstance(options, dict) and options:
        letters = sorted(options)
        return letters, [options[letter] for letter in letters]
    if isinstance(options, list) and options:
        if all(isinstance(one, dict) and {"key", "value"} <= one.keys() for one in options):
            return [one["key"] for one in options], [one["value"] for one in options]
        if len(options) <= len(_LETTERS) and all(isinstance(one, str | int | float) for one in options):
            return list(_LETTERS[: len(options)]), options
    raise InputError(
        f"{record.place}: 'options' must be texts by letter, a list of texts, or a list of key and value, not "
        f"{shortened(options)}"
    )


def _among(record: Record, letters: Sequence[Any], name: str) -> int | None:
    """The place of a column's letter among a record's own; None for a number, and for nothing. Raises InputError."""
    label = record.fields.get(name)
    if label in letters:
        return letters.index(label)
    if label in (None, "", -1) or _number(label) is not None:
        return None
    raise InputError(
        f"{record.place}: {name}: {shortened(label)} is none of its choices {', '.join(map(str, letters))}"
    )


def _medmcqa(record: Record, reading: Reading) -> Draft:
    choices = [record.fields.get(f"op{letter}") for letter in "abcd"]
    return _by_letter(record, reading, _text(record, "question"), choices, record.fields.get("cop"))


def _mmlu(record: Record, reading: Reading) -> Draft:
    choices = _column(record, "choices")
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # as ARC has them
        labels, key = choices.get("label"), record.fields.get("answerKey", record.fields.get("answer"))
        at = labels.index(key) if isinstance(labels, list) and key in labels else None
        return _by_letter(record, reading, _text(record, "question"), choices["text"], key, at)
    if not isinstance(choices, list):
        raise InputError(f"{record.place}: 'choices' must be a list of texts, not {shortened(choices)}")
    return _by_letter(record, reading, _text(record, "question"), choices, record.fields.get("answer"))


def _healthbench(record: Record, reading: Reading) -> Draft:
    rubrics, said = _column(record, "rubrics"), _column(record, "prompt")
    if not isinstance(rubrics, list):
        raise InputError(f"{record.place}: 'rubrics' must be a list, not {shortened(rubrics)}")
    criteria = [
        Criterion(str(one["criterion"]), float(one["points"]))
        for one in rubrics
        if isinstance(one, dict)
        and isinstance(one.get("criterion"), str)
        and isinstance(one.get("points"), int | float)
    ]
    if len(criteria) != len(rubrics) or not any(one.points > 0 for one in criteria):
        raise InputError(f"{record.place}: 'rubrics' must be a list of criterion and points, some of them above 0")
    try:
        prompt = prompt_of("prompt", said)
    except ValueError as error:
        raise InputError(f"{record.place}: {error}") from None
    return Draft(Item(**common_parts(record, reading, ("prompt", "rubrics")), prompt=prompt, rubric=tuple(criteria)))


def _conversation(record: Record, reading: Reading) -> Draft:
    columns = dict(_QUESTION_AND_ANSWER) if {"question", "answer"} <= record.fields.keys() else {}
    _check_free(record, reading)
    theirs = {**reading.columns, **columns}
    name = columns.get("completion", "completion")
    said = record.fields.get(name, "")
    if isinstance(said, int | float) and not isinstance(said, bool):
        record = replace(record, fields={**record.fields, name: str(said)})
    elif name in record.fields and (said is None or (isinstance(said, str) and not said.strip())):
        unanswered = Item(**common_parts(record, reading, (*theirs.values(), "prompt", "completion")))
        return Draft(unanswered, None, has_label=True)
    try:
        values = read_values(record, "sft", columns)
    except InputError as error:
        raise InputError(_in_their_words(str(error), record, theirs)) from None
    assert isinstance(values, Conversation)
    spoken = [number for number, message in enumerate(values.messages) if message["role"] == "assistant"]
    prompt, answer = values.messages[: spoken[-1]], str(values.messages[spoken[-1]]["content"])
    used = (*columns.values(), "prompt", "completion", "messages", "conversations", "instruction", "input", "output")
    base = common_parts(record, reading, used) | {"record": _renamed(record, columns)}
    parts = base | {"prompt": prompt, "plain": _as_text(prompt), "tools": values.tools}
    return Draft(Item(**parts, references=(answer,), is_readable=True))


def _in_their_words(error: str, record: Record, theirs: Mapping[str, str]) -> str:
    """What is wrong with a record, with its columns under the names that its file has for them."""
    said = error.removeprefix(record.place)
    for name, other in theirs.items():
        said = re.sub(rf"\b{name}\b", other.replace("\\", r"\\"), said)
    return error[: len(error) - len(error.removeprefix(record.place))] + said


def _check_free(record: Record, reading: Reading) -> None:
    """Raise InputError for choices beside an answer: as free text, the letter of the right one would be the answer."""
    name = next((one for one in ("choices", "options") if isinstance(record.fields.get(one), list | dict)), None)
    if name is not None and record.fields[name] and reading.format is None:
        raise InputError(
            f"{record.place}: it has choices ({name}), and is read as a question with an answer in words; say what "
            "they are with prompt, choices and answer in a TASK.yaml, or format: chat to leave them aside"
        )


def _fitting(columns: Mapping[str, str], record: Record) -> Mapping[str, str]:
    """A run's names of columns, where a record has them all and is no question with choices under names of its own."""
    if not columns or not set(columns.values()) <= record.fields.keys():
        return {}
    own = next((kind for kind in FORMATS.values() if kind.fits(record.fields)), None)
    return {} if own is not None and own.kind in ("choice", "rubric") else columns


def _renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with its fields under the names that stages read them by."""
    back = {theirs: ours for ours, theirs in columns.items()}
    return replace(record, fields={back.get(name, name): value for name, value in record.fields.items()})


def _as_text(prompt: Messages) -> str:
    """What a model without a chat template continues: the words of a single turn; nothing of a conversation."""
    alone = [message["role"] for message in prompt] == ["user"]
    return str(prompt[0]["content"]) if alone else ""


def _prompt_alone(record: Record, reading: Reading) -> Draft:
    """A prompt without an answer that would be right; what else the record has, such as a pair of answers, stays."""
    name = "prompt" if "prompt" in record.fields else "question"
    try:
        prompt = prompt_of(name, _column(record, name))
        tools = tools_of(found) if (found := record.fields.get("tools")) else None
    except ValueError as error:
        raise InputError(f"{record.place}: {error}") from None
    parts = common_parts(record, reading, (name, "tools", *_ANSWERS))
    return Draft(Item(**parts, prompt=prompt, plain=_as_text(prompt), tools=tools))


def _plain_text(record: Record, reading: Reading) -> Draft:
    values = read_values(record, "pretrain", {})
    assert isinstance(values, Text)
    base = common_parts(record, reading, ("text",))
    return Draft(Item(**base, plain=values.text, is_readable=True, is_text=True))


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda fields: all(name in fields for name in names)


def _is_pubmedqa(fields: Mapping[str, Any]) -> bool:
    """Whether a record is PubMedQA's; one without a decision is so as well, and has no answer."""
    return {"question", "final_decision"} <= {name.lower() for name in fields} or _has("QUESTION", "CONTEXTS")(fields)


def _is_conversation(fields: Mapping[str, Any]) -> bool:
    layouts = [*column_sets("sft"), ("question", "answer")]
    return any(all(name in fields for name in layout) for layout in layouts)


FORMATS = {
    kind.name: kind
    for kind in (
        Format("pubmedqa", _is_pubmedqa, _pubmedqa, "choice"),
        Format("medqa", _has("sent1", "ending0"), _medqa, "choice"),
        Format("medmcqa", _has("question", "opa", "opb", "opc", "opd"), _medmcqa, "choice"),
        Format("mmlu", _has("question", "choices"), _mmlu, "choice"),
        Format("medqa_options", lambda f: "question" in f and f.get("options") not in (None, ""), _options, "choice"),
        Format("healthbench", lambda f: isinstance(f.get("rubrics"), list) and "prompt" in f, _healthbench, "rubric"),
        Format("chat", _is_conversation, _conversation, "answer"),
        Format("prompt", lambda f: "prompt" in f or "question" in f, _prompt_alone, "question"),
        Format("text", _has("text"), _plain_text, "text"),
    )
}


def _labelled(drafts: Sequence[Draft], reading: Reading) -> tuple[list[Item], tuple[str, ...]]:
    """The items with the numbers of their right choices, and what is to be said of how these were counted."""
    if not drafts[0].is_choice:
        return [draft.item for draft in drafts], ()
    first, notes = _label_base(drafts, reading)
    items = [_with_gold(draft.item, _gold(draft, first)) for draft in drafts]
    if clashes := [draft for draft in drafts if _clashes(draft, first)]:
        one = clashes[0]
        notes = (
            *notes,
            f"{len(clashes)} answers are the text of one choice and would be the number or letter of another "
            f"({one.item.place}: {shortened(one.label)}): the text is taken",
        )
    return items, notes


def _with_gold(item: Item, gold: int) -> Item:
    """The item with its right choice; its text and its letter are both right in words."""
    said = dict.fromkeys([*item.references[gold : gold + 1], item.labels[gold]])
    return replace(item, gold=gold, references=tuple(said))


def _number(label: Any) -> int | None:
    if isinstance(label, bool):
        return None
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return (
        label if isinstance(label, int) else int(label) if isinstance(label, str) and label.strip().isdigit() else None
    )


def _place_of_text(draft: Draft) -> int | None:
    """Which choice says, word for word, what the label does."""
    if not isinstance(draft.label, str):
        return None
    said = draft.label.strip()
    return draft.item.references.index(said) if said in draft.item.references else None


def _place_of_sign(draft: Draft, first: int) -> int | None:
    """Which choice has the label as its number, or as what it is called."""
    number = _number(draft.label)
    if number is not None:
        return number - first if 0 <= number - first < len(draft.item.choices) else None
    said = draft.label.strip() if isinstance(draft.label, str) else ""
    for name in (said, said.upper()):
        for names in (draft.item.labels, draft.item.choices):
            if name in names:
                return names.index(name)
    return None


def _clashes(draft: Draft, first: int) -> bool:
    text, sign = _place_of_text(draft), _place_of_sign(draft, first)
    return draft.gold is None and text is not None and sign is not None and text != sign


def _label_base(drafts: Sequence[Draft], reading: Reading) -> tuple[int, tuple[str, ...]]:
    """Whether numbers of choices begin with 0 or 1, by all of them. Raises InputError where they do with neither."""
    counted = [draft for draft in drafts if draft.gold is None and _place_of_text(draft) is None]
    numbered = [(draft, number) for draft in counted if (number := _number(draft.label)) is not None]
    if reading.label_base is not None or not numbered:
        return reading.label_base or 0, ()
    from_zero = next((draft for draft, number in numbered if number == 0), None)
    past = next((draft for draft, number in numbered if number >= len(draft.item.choices)), None)
    if past is None:
        if from_zero is None:
            return 0, (
                "no answer is choice 0, and none is past the last: taken as counted from 0; if they are counted from "
                "1, set label_base: 1 in a TASK.yaml",
            )
        return 0, ()
    if from_zero is not None or _number(past.label) != len(past.item.choices):
        most = len(past.item.choices) - 1
        also = f", and {from_zero.item.place} has 0, so they are counted from 0" if from_zero is not None else ""
        raise InputError(
            f"{past.item.place}: label {_number(past.label)} is out of range: it has choices 0 to {most} "
            f"(or 1 to {most + 1}){also}"
        )
    return 1, (
        f"answers are counted from 1 ({past.item.place} has {past.label} of {len(past.item.choices)} choices); "
        "label_base in a TASK.yaml says otherwise",
    )


def _gold(draft: Draft, first: int) -> int:
    """The number of the right choice, from 0. Raises InputError for a label that is none of the item's."""
    item, label = draft.item, draft.label
    for found in (draft.gold, _place_of_text(draft), _place_of_sign(draft, first)):
        if found is not None:
            return found
    last = len(item.choices) - 1 + first
    raise InputError(
        f"{item.place}: the answer {shortened(label)} is none of its choices; it must be a number from {first} to "
        f"{last}, or one of {', '.join(item.labels)}"
    )


def check_identifiers(items: Sequence[Item]) -> None:
    """Raise InputError where two items have one identifier: answers are kept, and models compared, by it."""
    counts = Counter(item.id for item in items)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        places = [item.place for item in items if item.id == twice]
        others = sum(count > 1 for count in counts.values()) - 1
        more = f" (and {others} more are given twice)" if others else ""
        raise InputError(
            f"{places[1]}: identifier {shortened(twice)} is that of {places[0]}, too{more}; give each its own"
        )
