"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024, eq. 7 and 8): answers marked good or bad, not paired."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from core_training.data.examples import IGNORED, Batch, Example, Row, Tokens
from core_training.data.records import Record
from core_training.data.rows import SEQUENCE_TENSORS
from core_training.foundation.errors import InputError
from core_training.parts.data_kinds.values import JudgedAnswer
from core_training.parts.stages.kto import KTO
from core_training.stages.base import BatchLoss, Stage, mean_figure
from core_training.stages.chat import answer_tokens
from core_training.stages.language import sequence_logps


def kto_losses(ratios: torch.Tensor, kl: torch.Tensor, desirable: torch.Tensor, beta: float) -> torch.Tensor:
    """1 − σ(β(r − kl)) for desirable answers and 1 − σ(β(kl − r)) for the others; log-ratios of shape (examples,)."""
    direction = torch.where(desirable, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * direction * (ratios - kl))


class Kto(Stage[JudgedAnswer]):
    """An example's second sequence is its prompt with the answer to another one: from it the KL is estimated."""

    adds_up = False  # the KL is estimated from the whole batch
    needs_reference = True

    def tokenise(self, record: Record, values: JudgedAnswer) -> Example:
        own = answer_tokens(values.prompt, values.completion, self.base, record, values.tools)
        return Example((own,), {"desirable": float(values.label)})

    def check(self, examples: Sequence[Example]) -> None:
        labels = {example.numbers["desirable"] for example in examples}
        if len(labels) == 1:
            kind = "desirable (label true)" if labels == {1.0} else "undesirable (label false)"
            raise InputError(f"data.train: every example is {kind}; stage kto learns from both kinds")

    def arrange(self, rows: Sequence[Row]) -> Sequence[Row]:
        return _WithMismatched(rows, self.recipe.training.max_length)

    def weight(self, batch: Batch) -> torch.Tensor:
        return torch.tensor(len(batch["desirable"]), device=batch["input_ids"].device)

    def loss(self, model: nn.Module, batch: Batch) -> BatchLoss:
        # Shapes: own, mismatched, ratios, weights, losses (examples,); kl, tokens ().
        settings = self.recipe.settings(KTO)
        logps, tokens = self._logps(model, batch)
        own, mismatched = logps
        ratios = own - batch["reference_own"]
        # A KL is not negative, though its estimate from a few examples may be.
        kl = _mean_over_processes(mismatched - batch["reference_mismatched"], training=model.training).clamp(min=0)
        desirable = batch["desirable"] > 0
        weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
        losses = weights * kto_losses(ratios, kl, desirable, settings.beta)
        rewards = settings.beta * ratios.detach()
        figures = {
            "kl": mean_figure(kl),
            "desirable_reward": ((rewards * desirable).sum(), desirable.sum()),
            "undesirable_reward": ((rewards * ~desirable).sum(), (~desirable).sum()),
        }
        return BatchLoss(losses.sum(), torch.tensor(len(losses), device=losses.device), tokens, figures)

    def reference(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        own, mismatched = self._logps(model, batch)[0]
        return {"reference_own": own, "reference_mismatched": mismatched}

    def _logps(self, model: nn.Module, batch: Batch) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Log-probabilities of own and mismatched answers, and the tokens of the own ones. No gradient in the KL."""
        own, mismatched = ({name: batch[name].chunk(2)[i] for name in SEQUENCE_TENSORS} for i in (0, 1))
        # A forward of its own rather than one batch with the others: it keeps no activations.
        with torch.no_grad():
            mismatched_logps, _ = sequence_logps(model, mismatched)
        logps, tokens = sequence_logps(model, own)
        return (logps, mismatched_logps), tokens.sum()


class _WithMismatched(Sequence[Row]):
    """Each example with a second sequence: its own prompt, answered as another one."""

    def __init__(self, rows: Sequence[Row], max_length: int) -> None:
        self._rows = rows
        self._max_length = max_length
        self._others = _with_another_prompt(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        (example,), (another,) = self._rows[index], self._rows[self._others[index]]
        own, other = example.sequences[0], another.sequences[0]
        prompt, answer = own.part(0, _answer_start(own)), other.part(_answer_start(other), len(other))
        room = max(1, self._max_length - len(answer))  # the end of a long prompt is nearer to the answer
        prompt = prompt.part(max(0, len(prompt) - room), len(prompt))
        joined = Tokens(
            np.concatenate([prompt.input_ids, answer.input_ids]), np.concatenate([prompt.labels, answer.labels])
        )
        # Cut once more: the answer alone may be as long as the whole row.
        return (Example((own, joined.part(0, self._max_length)), example.numbers),)


def _with_another_prompt(rows: Sequence[Row]) -> list[int]:
    """For each row the nearest one before it, in a ring, that has another prompt (if all are the same: the one before).

    Data made of preference pairs have both answers to a prompt side by side: these are no mismatch.
    """
    prompts = [_prompt_digest(example.sequences[0]) for (example,) in rows]
    others = [index - 1 for index in range(len(rows))]
    if len(set(prompts)) == 1:
        return others
    for index in [*range(len(rows))] * 2:  # the second time round, the first rows know of the last ones
        others[index] = index - 1 if prompts[index] != prompts[index - 1] else others[index - 1]
    return others


def _prompt_digest(tokens: Tokens) -> bytes:
    return hashlib.sha256(tokens.input_ids[: _answer_start(tokens)].tobytes()).digest()


def _answer_start(tokens: Tokens) -> int:
    return int((tokens.labels != IGNORED).argmax())


def _mean_over_processes(values: torch.Tensor, *, training: bool) -> torch.Tensor:
    """The mean over all processes' values; an evaluation's batches belong to one process each."""
    if training and dist.is_initialized() and dist.get_world_size() > 1:
        sums = torch.stack([values.sum(), values.new_tensor(len(values))])
        dist.all_reduce(sums)
        return sums[0] / sums[1]
    return values.mean()
