"""What judges give to written answers: reward models, functions of the person's own, and a local model with rubrics."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core_training.data.examples import IGNORED, Example, Tokens
from core_training.data.records import Record
from core_training.data.rows import Collator, parts
from core_training.data.turns import turn
from core_training.foundation.bounded_reading import ForeignTextError, parse_value
from core_training.foundation.errors import InputError
from core_training.models.context import TOKENS_AT_ONCE, context_length
from core_training.models.heads import end_scores
from core_training.models.results import load_known_reward_model
from core_training.stages.chat import answer_tokens
from core_training.stages.reward_functions import Answered, RewardFunction, load_function
from evaluation.answers.prompts import opening, turns_of, uses_chat
from evaluation.answers.subjects import Subject
from evaluation.answers.writing import Writer
from evaluation.items import Criterion, Item, Judged, Sampling, Task, Written

_KEY = "rollout.reward_function: "
_ON_A_GPU = 16384
ATTEMPTS = 2
"""Times that a judge is asked for a verdict; what it gives none on is counted as unjudged."""
_VERDICT_TOKENS = 64


class RewardModel:
    """A reward model that a run trained, for the answers of one model: both must read the same tokens."""

    def __init__(self, run: Path, subject: Subject) -> None:
        """Raises InputError for a run of another stage, and for one whose tokens are others."""
        try:
            loaded = load_known_reward_model(run, subject.base.vocabulary_digest)
        except InputError as error:
            raise InputError(f"--reward: {str(error).removeprefix('rollout.reward_model: ')}") from None
        self._model = loaded[0]
        self._model.to(subject.device)  # type: ignore[arg-type]
        self.digest = loaded[1]
        self._subject = subject
        self._most = context_length(self._model)

    def values(
        self, task: Task, items: Mapping[str, Item], written: Sequence[Written]
    ) -> Iterator[list[tuple[Written, float]]]:
        """A score for each answer, batch by batch."""
        examples = [self._example(task, items[one.id], one) for one in written]
        collate = Collator(int(self._subject.tokenizer.pad_token_id or 0))
        at_once = TOKENS_AT_ONCE if self._subject.device.type == "cpu" else _ON_A_GPU
        for part in parts([len(example) for example in examples], at_once):
            batch = collate([(examples[index],) for index in part])
            batch = {name: tensor.to(self._subject.device) for name, tensor in batch.items()}
            with torch.inference_mode():
                scores = end_scores(self._model, self._model.get_submodule("score"), batch).tolist()
            yield [(written[index], score) for index, score in zip(part, scores, strict=True)]

    def _example(self, task: Task, item: Item, one: Written) -> Example:
        """The tokens of prompt and answer, labelled on the answer. One that was cut off has no end."""
        if uses_chat(task, item, self._subject):
            turns, said = turns_of(item, self._subject), [turn("assistant", one.text)]
            tokens = answer_tokens(turns, said, self._subject.base, item.record, item.tools)
            ids, labels = tokens.input_ids, tokens.labels
        else:
            whole = self._subject.tokenizer(item.plain + item.delimiter + one.text)["input_ids"]
            ids = torch.tensor(whole).numpy()
            labels = ids.copy()
        keep = len(ids)
        ends = self._subject.base.end_tokens
        while not one.ended and keep > 1 and (int(ids[keep - 1]) in ends or labels[keep - 1] == IGNORED):
            keep -= 1
        start = max(0, keep - self._most)
        labels = labels.copy()
        labels[keep - 1] = ids[keep - 1]  # an empty answer is judged where it would begin
        return Example((Tokens(ids[start:keep], labels[start:keep]),))


def load_own(name: str) -> RewardFunction:
    """A function of the person's own: `FILE.py:name`, or `module:name` by import. Raises InputError."""
    module, _, function = name.rpartition(":")
    if module.endswith(".py"):
        try:
            return load_function(name, 1.0, 0)
        except InputError as error:
            raise InputError(f"metrics: {str(error).removeprefix(_KEY)}") from None
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (Exception, SystemExit) as error:  # the module is the person's own: it may raise anything
        raise InputError(f"metrics: {name}: {module} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise InputError(f"metrics: {name}: {module} has no function '{function}'")
    return RewardFunction(found, name)


def own_values(function: RewardFunction, items: Mapping[str, Item], written: Sequence[Written]) -> list[float]:
    """What the function gives to each answer: it is called as reward functions are, with the columns of the items.

    `expected` is among them. Raises InputError for what is not a number an answer.
    """
    chosen = [items[one.id] for one in written]
    answered = Answered(
        [item.question for item in chosen],
        [one.text for one in written],
        [[] for _ in written],
        [{**item.record.fields, "expected": item.expected} for item in chosen],
    )
    lacking = [
        name for name, needed in function.wanted.items() if needed and name not in _all_columns(answered.columns)
    ]
    if lacking:
        raise InputError(f"metrics: {function.name} takes '{lacking[0]}', which is no column of the items")
    try:
        return [float(value) for value in function.rewards(answered).tolist()]
    except InputError as error:
        raise InputError(f"metrics: {str(error).removeprefix(_KEY)}") from None


def _all_columns(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for row in rows for name in row}


_ASKED = """A conversation ended with this answer.

{conversation}

Answer:
{answer}

Criterion: {criterion}

Does the answer meet the criterion? Say {{"criteria_met": true}} or {{"criteria_met": false}} and nothing else."""


class RubricJudge:
    """A local model that is asked of each criterion whether an answer meets it, at most `ATTEMPTS` times."""

    def __init__(self, subject: Subject, seed: int = 0) -> None:
        self._subject = subject
        self._seed = seed
        self.cut = 0
        """The questions that lost their beginning: the judge had no room for them."""

    def judged(self, items: Mapping[str, Item], written: Sequence[Written]) -> Iterator[Judged]:
        """The verdicts on each answer, None where the judge gave none that can be read."""
        for one in written:
            rubric = items[one.id].rubric
            verdicts: list[bool | None] = [None] * len(rubric)
            for attempt in range(ATTEMPTS):
                open_ones = [number for number, verdict in enumerate(verdicts) if verdict is None]
                if not open_ones:
                    break
                said = self._asked([_question(items[one.id], one, rubric[number]) for number in open_ones], attempt)
                for number, text in zip(open_ones, said, strict=True):
                    verdicts[number] = verdict_in(text)
            yield Judged(one.id, one.sample, tuple(verdicts))

    def _asked(self, questions: Sequence[str], attempt: int) -> list[str]:
        """The judge's words on each question; the second time they are drawn, as the likeliest did not do."""
        sampling = Sampling(_VERDICT_TOKENS, temperature=0.0 if attempt == 0 else 0.7, seed=self._seed + attempt)
        asked = Task("rubric", [], ())
        prompts = {
            str(number): opening(asked, as_item(number, question), self._subject)
            for number, question in enumerate(questions)
        }
        writer = Writer(self._subject, sampling)
        found = {one.id: one.text for batch in writer.written(prompts) for one in batch}
        self.cut += writer.cut
        return [found[str(number)] for number in range(len(questions))]


def as_item(number: int, question: str) -> Item:
    """A judge's question as an item."""
    record = Record({}, Path("rubric"), number + 1)
    return Item(str(number), record, "", prompt=[turn("user", question)], plain=question + "\n")


def _question(item: Item, one: Written, criterion: Criterion) -> str:
    conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in item.prompt)
    return _ASKED.format(conversation=conversation, answer=one.text, criterion=criterion.text)


_OBJECT = re.compile(r"\{[^{}]*\}", re.DOTALL)


def verdict_in(text: str) -> bool | None:
    """The verdict in a judge's words: its JSON, or a yes or no at the beginning; None where there is neither."""
    for found in _OBJECT.findall(text):
        try:
            value = parse_value(found)
        except (ForeignTextError, ValueError):
            continue
        if isinstance(value, dict) and isinstance(value.get("criteria_met"), bool):
            return bool(value["criteria_met"])
    first = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
    return None if first is None else first[1].lower() in ("yes", "true")


def function_digest(name: str) -> str:
    """What a function's values are kept under: its file's content, so that a changed one is asked anew."""
    file = Path(name.rpartition(":")[0])
    content = file.read_bytes() if file.suffix == ".py" and file.is_file() else json.dumps(name).encode()
    return hashlib.sha256(content).hexdigest()[:16]
