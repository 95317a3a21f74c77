"""Tokens a second and peak memory of LoRA training, against TRL's trainers, on one model and the same records.

Three comparisons of each stage: both sides in their default settings (ours: float32; TRL's: bfloat16 autocast over
float32 weights, gradient checkpointing, no packing), both in float32, and both on a bfloat16 model. What the comparison
does not name stays at each side's default, but rank, targets, batch size and the longest row are the same.

Tokens are those of the examples after the cut, prompts included and padding not: both sides see the same ones once an
epoch. Speed: the sides take turns in one process, an epoch each; DPO is charged with its reference pass in every epoch,
though it is made but once a run. Memory: each side trains an epoch in a process of its own; counted is the peak of
resident memory beyond what the process held after its imports.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from benchmarks.engine.sides import LIBRARIES, Ours, Trl
from benchmarks.figure import Figure
from benchmarks.fresh_process import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from benchmarks.places import Places
from core_training.data.records import read_records
from core_training.foundation.errors import RunError

RECORDS_PER_SITE = 4
TURNS = 3
WARM_UP_TURNS = 1
MAX_LENGTH = 512
STAGES = ("sft", "dpo")


@dataclass(frozen=True)
class Setting:
    """A comparison: the dtype of our model, what TRL's configuration is given, and the targets."""

    dtype: str
    trl: dict[str, Any]
    speed: float
    memory: float


SETTINGS = {
    "defaults": Setting("float32", {}, 1.5, 0.75),
    "fp32": Setting("float32", {"bf16": False}, 1.0, 1.0),
    "bf16": Setting("bfloat16", {"model_init_kwargs": {"dtype": "bfloat16"}}, 1.0, 1.0),
}


def measure(places: Places) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        files = {stage: str(_write_records(places, stage, Path(name) / f"{stage}.jsonl")) for stage in STAGES}
        for stage in STAGES:
            for setting, terms in SETTINGS.items():
                arguments = {"model": str(places.model), "file": files[stage], "stage": stage, "setting": setting}
                yield _speed(stage, setting, terms, in_fresh_process(take_turns, **arguments).result)
                held = {side: in_fresh_process(held_by, side=side, **arguments).result for side in ("ours", "trl")}
                yield _memory(stage, setting, terms, held)
        yield _second_round(*in_fresh_process(two_rounds, model=str(places.model), file=files["dpo"]).result)


def _speed(stage: str, setting: str, terms: Setting, details: dict[str, Any]) -> Figure:
    return Figure(
        name=f"{stage}_speed_{setting}",
        meaning=f"tokens/s of LoRA {stage}, {setting}, relative to TRL's trainer",
        value=details["ratio"],
        unit="",
        target=terms.speed,
        at_least=True,
        details=details,
    )


def _memory(stage: str, setting: str, terms: Setting, held: dict[str, int]) -> Figure:
    return Figure(
        name=f"{stage}_memory_{setting}",
        meaning=f"peak memory of LoRA {stage}, {setting}, relative to TRL's trainer",
        value=held["ours"] / held["trl"],
        unit="",
        target=terms.memory,
        details={f"{side}_bytes": peak for side, peak in held.items()},
    )


def _second_round(model_bytes: int, first: int, second: int) -> Figure:
    return Figure(
        name="dpo_second_round",
        meaning="peak memory of a site's second round of full DPO beyond its first's, relative to the model's size",
        value=(second - first) / model_bytes,
        unit="",
        target=0.5,  # one more reference would be 1
        details={"model_bytes": model_bytes, "first_round_bytes": first, "second_round_bytes": second},
    )


def take_turns(model: str, file: str, stage: str, setting: str) -> dict[str, Any]:
    """Let both sides train an epoch each in turn; medians over the turns after the first."""
    ours, trl = _ours(model, file, stage, setting, TURNS), _trl(model, file, stage, setting, TURNS)
    if ours.tokens != trl.tokens:
        raise RunError(f"the sides do not see the same: {ours.tokens} and {trl.tokens} tokens")
    our_seconds: list[float] = []
    epochs = trl.train(lambda: our_seconds.append(ours.train_epoch().seconds))
    seconds = list(zip(our_seconds, (epoch.seconds for epoch in epochs), strict=True))[WARM_UP_TURNS:]
    return {
        "ratio": statistics.median(theirs / our for our, theirs in seconds),
        "our_tokens_per_second": ours.tokens / statistics.median(our for our, _ in seconds),
        "trl_tokens_per_second": trl.tokens / statistics.median(theirs for _, theirs in seconds),
        "ratios": [theirs / our for our, theirs in seconds],
        "tokens": ours.tokens,
        "reference_seconds": ours.reference_seconds,
    }


def held_by(side: str, model: str, file: str, stage: str, setting: str) -> int:
    """Peak bytes beyond the imports' of one side that loads model and records and trains an epoch."""
    before = _resident_with(LIBRARIES[side])
    if side == "ours":
        _ours(model, file, stage, setting, 1).train_epoch()
    else:
        _trl(model, file, stage, setting, 1).train()
    return peak_bytes() - before


def two_rounds(model: str, file: str) -> list[int]:
    """Bytes of the trained parameters, and the peaks beyond the imports' of a site's first and second round of DPO."""
    before = _resident_with(LIBRARIES["ours"])
    site = _ours(model, file, "dpo", "defaults", 2, "full")
    held = [4 * site.engine.manifest.size]
    for _ in range(2):
        site.engine.begin_round(site.engine.read_state())
        site.train_epoch()
        held.append(peak_bytes() - before)
        gc.collect()
        forget_peak()
    return held


def _resident_with(modules: Sequence[str]) -> int:
    """What the process holds once it has imported these."""
    for module in modules:
        import_module(module)
    return resident_bytes()


def _ours(model: str, file: str, stage: str, setting: str, epochs: int, mode: str = "lora") -> Ours:
    sections = {
        "model": {"name_or_path": model, "dtype": SETTINGS[setting].dtype},
        "stage": stage,
        "tuning": {"mode": mode},
        "data": {"train": file},
        "training": {"max_length": MAX_LENGTH},
    }
    return Ours(sections, epochs)


def _trl(model: str, file: str, stage: str, setting: str, epochs: int) -> Trl:
    return Trl(model, file, stage, epochs, max_length=MAX_LENGTH, **SETTINGS[setting].trl)


def _write_records(places: Places, stage: str, path: Path) -> Path:
    """Questions and answers of all sites; in a pair, the rejected answer is that to the site's next question."""
    lines = []
    for file in places.sites.values():
        records = [record.fields for record in islice(read_records(file), RECORDS_PER_SITE + 1)]
        for this, following in pairwise(records):
            if this["answer"] == following["answer"]:
                continue
            prompt = [{"role": "user", "content": this["question"]}]
            answer, other = ([{"role": "assistant", "content": one["answer"]}] for one in (this, following))
            if stage == "sft":
                lines.append({"prompt": prompt, "completion": answer})
            else:
                lines.append({"prompt": prompt, "chosen": answer, "rejected": other})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
