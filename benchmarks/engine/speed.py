"""The engine's tokens a second in LoRA fine-tuning, against a hand-written PyTorch loop on the very same batches.

Engine and loops take turns in one process, a slice each, so that whatever else the machine does falls on all of them.
The hand-written loop has the engine's loss (logits only where a label is) and gets its batches ready-made, in the same
parts: it shows what the trainer costs beyond the mathematics. A second loop, with the model's own loss as most scripts
have it, is in the details.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training.data.examples import IGNORED
from core_training.engine.engine import open_engine
from core_training.engine.step_loop import StepLoop
from core_training.foundation.errors import RunError
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.stages.base import BatchLoss

TARGET = 1.0
SLICES = 9
STEPS = 8
WARM_UP_SLICES = 1

Part = dict[str, torch.Tensor]
Batch = list[Part]


def measure(places: Places) -> Figure:
    total = SLICES * STEPS
    recipe = places.recipe("topology.kind=central", f"training.max_steps={total}", f"training.save_steps={total}")
    details = in_fresh_process(compare, recipe_text=recipe.to_yaml()).result
    return Figure(
        name="engine_speed",
        meaning="engine's tokens/s, SFT LoRA, relative to a hand-written loop's",
        value=details["ratio"],
        unit="",
        target=TARGET,
        at_least=True,
        details=details,
    )


def compare(recipe_text: str) -> dict[str, float]:
    """Let the engine and both loops train in turn; medians over the slices after the first."""
    recipe = parse_recipe(recipe_text)
    engine = open_engine(recipe)
    loop, usual = _PlainLoop(recipe, _loss_where_labelled), _PlainLoop(recipe, _loss_of_the_model)
    batches: list[Batch] = []
    inner = StepLoop._accumulate

    def recording(loop: StepLoop, update: Sequence[Sequence[Any]]) -> list[BatchLoss]:
        batches.extend(update)
        return inner(loop, update)

    seconds: list[tuple[float, float, float]] = []
    tokens: list[int] = []
    engine.launch()
    for _ in range(SLICES):
        batches.clear()
        with patch.object(StepLoop, "_accumulate", recording):
            report = engine.train(STEPS)
        loop_seconds, loss = loop.train(batches)
        if abs(loss - report.loss_last) > 1e-3:
            raise RunError(f"engine and loop do not do the same: their losses are {report.loss_last} and {loss}")
        seconds.append((report.seconds, loop_seconds, usual.train(batches)[0]))
        tokens.append(sum(part["input_ids"].numel() for batch in batches for part in batch))
    engine.close()
    counted = list(zip(tokens, seconds, strict=True))[WARM_UP_SLICES:]
    return {
        "ratio": statistics.median(by_loop / by_engine for _, (by_engine, by_loop, _) in counted),
        "ratio_to_the_models_own_loss": statistics.median(other / by_engine for _, (by_engine, _, other) in counted),
        "engine_tokens_per_second": statistics.median(n / by_engine for n, (by_engine, _, _) in counted),
        "loop_tokens_per_second": statistics.median(n / by_loop for n, (_, by_loop, _) in counted),
        "slices": len(counted),
        "steps_per_slice": STEPS,
    }


class _PlainLoop:
    """Forward, backward, clip, step: what one writes without a trainer."""

    def __init__(self, recipe: Recipe, loss: Callable[[Any, Part], torch.Tensor]) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        lora, training = recipe.tuning.settings(LORA), recipe.training
        base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
        torch.manual_seed(training.seed)
        config = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model = get_peft_model(base, config).train()
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=recipe.learning_rate, weight_decay=0.0)
        total = training.max_steps or 1
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1 - step / total)
        self._clip = training.max_grad_norm
        self._loss = loss

    def train(self, batches: list[Batch]) -> tuple[float, float]:
        """Seconds, and the last batch's loss before its step."""
        began = time.perf_counter()
        for batch in batches:
            labelled = [(part["labels"][:, 1:] != IGNORED).sum() for part in batch]
            total = torch.zeros(())
            for part, tokens in zip(batch, labelled, strict=True):
                loss = self._loss(self._model, part) * tokens / sum(labelled)
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        return time.perf_counter() - began, float(total)


def _loss_where_labelled(model: Any, part: Part) -> torch.Tensor:
    labels = part["labels"][:, 1:]
    kept = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = model(part["input_ids"], position_ids=part["position_ids"], logits_to_keep=kept, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, kept].flatten(), ignore_index=IGNORED)


def _loss_of_the_model(model: Any, part: Part) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=part["input_ids"], labels=part["labels"], use_cache=False).loss
    return loss
