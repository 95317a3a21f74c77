"""How fast questions are answered: choices on a shared cache, and answers in batches, each beside one by one.

The other side is plain code of transformers, as one would write it: a forward for each choice, a `generate` for each
prompt, and `generate` over batches in the order of the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median
from typing import Any

import torch

from benchmarks.figure import Figure
from benchmarks.places import Places
from core_training.data.records import Record, records_in
from core_training.foundation.errors import InputError
from evaluation.answers.prompts import Continued, continued, opening
from evaluation.answers.scoring import Scorer
from evaluation.answers.subjects import Subject, load_subject
from evaluation.answers.writing import Writer
from evaluation.items import Item, Sampling, Task

QUESTIONS = 60
"""As many as were measured with lm-evaluation-harness, of PubMedQA's length and number of choices."""
WORDS = 150
PROMPTS = 40
TOKENS = 32
BATCH = 20
ROUNDS = 3
CHOICES_TARGET = 2.5
ANSWERS_TARGET = 6.0


def measure(places: Places) -> Iterator[Figure]:
    subject = load_subject(str(places.model))
    records = list(islice(records_in(str(places.data)), 10 * PROMPTS))
    yield _choices(subject, records)
    yield from _answers(subject, records)


def _choices(subject: Subject, records: list[Record]) -> Figure:
    choices = ("yes", "no", "maybe")
    items = [
        Item(
            str(n),
            record,
            record.source,
            plain=f"{' '.join(record.fields['answer'].split()[:WORDS])}\nQuestion: {record.fields['question']}",
            choices=choices,
            labels=choices,
            gold=0,
        )
        for n, record in enumerate(records[:: len(records) // QUESTIONS][:QUESTIONS])
    ]
    task = Task("choices", items, (), chat=False)
    asked = [continued(task, item, choices, subject) for item in items]
    found: dict[str, tuple[float, ...]] = {}

    def shared() -> None:
        for batch in Scorer(subject).scored(asked):
            found.update({one.id: one.logps for one in batch})

    expected: dict[str, list[float]] = {}

    def whole() -> None:
        for one in asked:
            expected[one.id] = [_logp(subject, one, ids) for ids in one.wholes]

    ours, theirs = zip(*((_seconds(shared), _seconds(whole)) for _ in range(ROUNDS)), strict=True)
    far = max(abs(a - b) for name in found for a, b in zip(found[name], expected[name], strict=True))
    if far > 1e-4:
        raise InputError(f"the log-likelihoods differ by {far}")
    return Figure(
        name="choices",
        meaning="questions a second by prompt-once scoring, relative to a forward for each choice",
        value=median(theirs) / median(ours),
        unit="",
        target=CHOICES_TARGET,
        at_least=True,
        details={
            "questions": len(items),
            "seconds": ours,
            "seconds_of_whole_forwards": theirs,
            "largest_difference_of_log_likelihoods": far,
            "tokens": sum(len(one.wholes[0]) for one in asked),
        },
    )


def _logp(subject: Subject, one: Continued, ids: tuple[int, ...]) -> float:
    with torch.inference_mode():
        logits = subject.model(torch.tensor([ids], device=subject.device)).logits[0].float().log_softmax(dim=-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(one.start, len(ids)))


def _answers(subject: Subject, records: list[Record]) -> Iterator[Figure]:
    task = Task("answers", [], ())
    prompts = {}
    for n, record in enumerate(records[:: len(records) // PROMPTS][:PROMPTS]):
        turns = [{"role": "user", "content": record.fields["question"]}]
        prompts[str(n)] = opening(task, Item(str(n), record, "", prompt=turns), subject)
    writer = Writer(subject, Sampling(max_tokens=TOKENS))
    texts: dict[str, dict[str, str]] = {"batched": {}, "alone": {}, "transformers": {}}

    def batched() -> None:
        for batch in writer.written(prompts):
            texts["batched"].update({one.id: one.text for one in batch})

    def alone() -> None:
        for name, prompt in prompts.items():
            texts["alone"][name] = _generated(subject, [prompt])[0]

    def transformers() -> None:
        names = list(prompts)
        for start in range(0, len(names), BATCH):
            chosen = names[start : start + BATCH]
            said = _generated(subject, [prompts[name] for name in chosen])
            texts["transformers"].update(zip(chosen, said, strict=True))

    ways: tuple[Callable[[], Any], ...] = (batched, alone, transformers)
    ours, one_by_one, theirs = zip(*(tuple(map(_seconds, ways)) for _ in range(ROUNDS)), strict=True)
    if texts["batched"] != texts["alone"]:
        raise InputError("the texts of batches are not those that are written alone")
    details = {
        "answers": len(prompts),
        "tokens": TOKENS,
        "seconds": ours,
        "seconds_one_by_one": one_by_one,
        "seconds_of_transformers_batches": theirs,
    }
    yield Figure(
        name="answers",
        meaning="answers a second in batches, relative to one by one, with the same words",
        value=median(one_by_one) / median(ours),
        unit="",
        target=ANSWERS_TARGET,
        at_least=True,
        details=details,
    )
    yield Figure(
        name="answers_against_transformers",
        meaning=f"answers a second, relative to transformers' own batches of {BATCH} in the order of the file",
        value=median(theirs) / median(ours),
        unit="",
        target=1.0,
        at_least=True,
        details=details,
    )


def _generated(subject: Subject, prompts: list[list[int]]) -> list[str]:
    width = max(map(len, prompts))
    pad = int(subject.tokenizer.pad_token_id or 0)
    ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=subject.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=subject.device)
    model: Any = subject.model
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=subject.base.end_tokens,
        )
    texts = []
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in subject.base.end_tokens), len(row))
        texts.append(str(subject.tokenizer.decode(row[:end], skip_special_tokens=True)).strip())
    return texts


def _seconds(work: Callable[[], object]) -> float:
    """Processor time without a GPU: other work on the machine would count otherwise."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    work()
    return clock() - began
