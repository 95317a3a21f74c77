"""The loss of records, as training measures it: the same tokens, the same cut, each record's sum by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from core_training.data.examples import IGNORED, Example
from core_training.data.rows import Collator, parts
from core_training.engine.tokenising import Outcome, tokenised_records
from core_training.foundation.errors import InputError
from core_training.models.context import TOKENS_AT_ONCE
from core_training.recipe.schema import Recipe
from core_training.stages.base import load_stage
from core_training.stages.language import labelled_logits, token_logps
from evaluation.answers.prompts import continued
from evaluation.answers.subjects import Subject
from evaluation.items import Item, Measured, Task

_ON_A_GPU = 16384


def loss_examples(task: Task, subject: Subject, max_length: int) -> tuple[dict[str, Example], dict[str, int]]:
    """The items' tokens with labels on what is learnt of them, by identifier; and what was left out or cut, counted.

    A record that a stage of training reads becomes the tokens that training would make of it. Without a chat template
    the words behind the prompt are what counts.
    """
    told: dict[str, int] = {}
    readable = [item for item in task.items if item.is_readable and (item.is_text or subject.has_template)]
    found: dict[str, Example] = {}
    for is_text in (True, False):
        chosen = [item for item in readable if item.is_text == is_text]
        if chosen:
            found |= _as_training_reads(chosen, subject, max_length, told, stage="pretrain" if is_text else "sft")
    for item in task.items:
        if item.id not in found and item not in readable:
            found[item.id] = _behind_prompt(task, item, subject)
    return found, told


def _as_training_reads(
    items: Sequence[Item], subject: Subject, max_length: int, told: dict[str, int], *, stage: str
) -> dict[str, Example]:
    recipe = _recipe_of(subject.recipe, stage, max_length)
    outcome, loaded = Outcome(), load_stage(recipe, subject.base)
    found: dict[str, Example] = {}
    records = [item.record for item in items]
    # Records come back in their order, and none is left out on the way where nothing is held out.
    for item, one in zip(items, tokenised_records(recipe, loaded, records, outcome), strict=True):
        if one.truncated:
            _count(told, f"cut at {max_length} tokens")
        if not one.useful:
            _count(told, f"left out: nothing to learn within {max_length} tokens")
        for number, example in enumerate(one.useful):
            found[item.id if not number else f"{item.id}\n{number}"] = example
    return found


def _recipe_of(recipe: Recipe, stage: str, max_length: int) -> Recipe:
    """The run's recipe, reading records as they are, for a stage that has a loss per token."""
    own = recipe.stage if recipe.stage in ("sft", "pretrain") else "sft"
    data = recipe.data.model_copy(
        update={"eval": None, "eval_fraction": 0.0, "columns": {}, "on_error": "stop", "max_samples": None}
    )
    training = recipe.training.model_copy(update={"packing": False, "max_length": max_length})
    privacy = recipe.privacy.model_copy(update={"differential_privacy": None})  # nobody's part is hidden from himself
    changes: dict[str, Any] = {"data": data, "training": training, "privacy": privacy}
    if stage != own or own != recipe.stage:
        changes["stage"] = stage
    return recipe.model_copy(update=changes)


def _behind_prompt(task: Task, item: Item, subject: Subject) -> Example:
    from core_training.data.examples import Tokens

    if not item.references and item.gold is None:
        raise InputError(f"{item.place}: there is nothing to measure a loss on: it has no answer")
    right = item.choices[item.gold] if item.gold is not None else item.references[0]
    whole = continued(task, item, (right,), subject)
    ids = torch.tensor(whole.wholes[0]).numpy()
    labels = ids.copy()
    labels[: whole.start] = IGNORED
    return Example((Tokens(ids, labels),))


def _count(told: dict[str, int], what: str) -> None:
    told[what] = told.get(what, 0) + 1


def measured(examples: dict[str, Example], subject: Subject, known: Collection[str] = ()) -> Iterator[list[Measured]]:
    """The loss of each example, batch by batch, without items that are `known`.

    The name of an example is its item's identifier; that of a further piece of one record goes on behind a line's end.
    """
    names = sorted(examples, key=lambda name: len(examples[name]))
    lengths = [len(examples[name]) for name in names]
    collate = Collator(int(subject.tokenizer.pad_token_id or 0))
    at_once = TOKENS_AT_ONCE if subject.device.type == "cpu" else _ON_A_GPU
    items = [name.partition("\n")[0] for name in names]
    for part in parts(lengths, at_once):
        if all(items[index] in known for index in part):
            continue
        batch = collate([(examples[names[index]],) for index in part])
        batch = {name: tensor.to(subject.device) for name, tensor in batch.items()}
        with torch.inference_mode():
            logits, labels = labelled_logits(subject.model, batch)
            logps = token_logps(logits, labels).double().sum(dim=1)
            counted = labels != IGNORED
            correct = ((logits.argmax(dim=-1) == labels) & counted).sum(dim=1)
        yield [
            Measured(items[index], -logp, tokens, right)
            for index, logp, tokens, right in zip(
                part, logps.tolist(), counted.sum(dim=1).tolist(), correct.tolist(), strict=True
            )
            if items[index] not in known
        ]
