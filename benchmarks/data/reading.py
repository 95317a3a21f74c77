"""How fast records become tokens: in `data show` on two cores, and in a run beside what the tokenizer alone takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median

from benchmarks.figure import Figure
from benchmarks.places import Places
from core_training.engine.dataset import load_dataset
from core_training.engine.tokenising import Outcome, tokenised_records, training_records
from core_training.models.base_model import BaseModel
from core_training.models.outline import Outline
from core_training.stages.base import load_stage

RECORDS = 10_000
PROCESSES = 2
ROUNDS = 3
SHOWN_TARGET = 5_000
BEFORE = 1.94
"""What a run took for reading and tokenising beside the tokenizer alone, before records were checked as they are now.

Measured by these lines at commit 8c87f63, the lower of two runs' medians, in turns with this code.
"""


def measure(places: Places) -> Iterator[Figure]:
    recipe = places.recipe("training.packing=false")
    stage = load_stage(recipe, Outline(recipe))
    records = list(islice(training_records(recipe), RECORDS))
    encode = stage.base.tokenizer.backend_tokenizer.encode
    texts = [record.fields["answer"] for record in records]

    def tokenise_alone() -> None:
        for text in texts:
            _ = encode(text, add_special_tokens=False).ids

    def show() -> None:
        for _ in tokenised_records(recipe, stage, records, Outcome(), processes=PROCESSES):
            pass

    alone, shown = zip(*((_seconds(tokenise_alone), _seconds(show)) for _ in range(ROUNDS)), strict=True)
    yield Figure(
        name="data_show",
        meaning=f"records a second of MedQuAD as `data show` makes them tokens, on {PROCESSES} cores",
        value=len(records) / median(shown),
        unit="/s",
        target=SHOWN_TARGET,
        at_least=True,
        details={
            "records": len(records),
            "seconds": shown,
            "records_a_second_of_the_tokenizer_alone_on_one_core": len(records) / median(alone),
        },
    )
    trained = load_stage(recipe, BaseModel(recipe))
    alone, loaded = zip(
        *((_seconds(tokenise_alone), _seconds(lambda: load_dataset(recipe, trained, records))) for _ in range(ROUNDS)),
        strict=True,
    )
    ratios = [load / tokenise for load, tokenise in zip(loaded, alone, strict=True)]
    yield Figure(
        name="reading",
        meaning="time in which a run reads and tokenises its records, relative to the tokenizer alone",
        value=median(ratios),
        unit="",
        target=BEFORE,
        details={"records": len(records), "seconds": loaded, "seconds_of_the_tokenizer_alone": alone, "ratios": ratios},
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
