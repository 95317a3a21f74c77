"""Log-likelihoods of continuations: the prompt is computed once, and every continuation on its cache, in batches.

A model whose cache cannot be shared like that is found out on the first batch, and computed whole instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from core_training.foundation.errors import RunError
from evaluation.answers.prompts import Continued
from evaluation.answers.subjects import Subject
from evaluation.items import Scored

_ON_A_CPU, _ON_A_GPU = 2048, 32768
"""Tokens, padding included, that are computed together."""
_LOGITS = 2**26
"""Numbers of logits that are held at once."""
_CLOSE = 1e-2
"""Nats by which the two ways may differ: low precision rounds, and a cache misused is off by whole ones."""


class Scorer:
    """A model's log-likelihoods; `shares` says whether it computes a prompt once for all that follow it."""

    def __init__(self, subject: Subject, *, shares: bool = True) -> None:
        self._model: Any = subject.model
        self._pad = int(subject.tokenizer.pad_token_id or 0)
        self._device = subject.device
        self._most = _ON_A_CPU if subject.device.type == "cpu" else _ON_A_GPU
        self.shares = shares
        self._is_proven = False

    def scored(self, asked: Sequence[Continued], known: Collection[str] = ()) -> Iterator[list[Scored]]:
        """The log-probability of each continuation, batch by batch, without those that are `known`.

        Prompts of similar length are computed together, the same ones whatever is known already. Raises RunError where
        a forward pass fails.
        """
        for batch in self.batches(asked):
            if all(one.id in known for one in batch):
                continue
            try:
                with torch.inference_mode():
                    found = self._scored(batch)
                yield [one for one in found if one.id not in known]
            except torch.cuda.OutOfMemoryError as error:
                raise RunError(f"out of memory on the GPU while scoring {len(batch)} prompts together") from error

    def batches(self, asked: Sequence[Continued]) -> Iterator[list[Continued]]:
        """Prompts that are computed together, longest first, so that what does not fit is known at once."""
        batch: list[Continued] = []
        for one in sorted(asked, key=lambda one: -one.shared):
            longest = max([len(other.wholes[0]) for other in batch] + [len(one.wholes[0])])
            if batch and (len(batch) + 1) * longest > self._most:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _scored(self, batch: Sequence[Continued]) -> list[Scored]:
        if not self.shares or any(one.shared < 1 for one in batch):
            return self._whole(batch)
        if self._is_proven:
            return self._on_cache(batch)
        try:
            cached = self._on_cache(batch)
        except (AttributeError, NotImplementedError, TypeError, ValueError, IndexError, RuntimeError):
            self.shares = False  # its cache is of another kind
            return self._whole(batch)
        if not self._agrees(batch, cached):
            self.shares = False
            return self._whole(batch)
        self._is_proven = len(batch) > 1
        return cached

    def _agrees(self, batch: Sequence[Continued], cached: Sequence[Scored]) -> bool:
        """Whether the longest and the shortest prompt, which is padded most, have what a whole forward gives them.

        One continuation of each is looked at, the longest: it says most about the cache.
        """
        for number in {0, len(batch) - 1}:
            one = batch[number]
            longest = max(range(len(one.wholes)), key=lambda place: len(one.wholes[place]))
            (whole,) = self._whole([Continued(one.id, (one.wholes[longest],), one.start)])
            if not abs(whole.logps[0] - cached[number].logps[longest]) <= _CLOSE * max(1.0, abs(whole.logps[0])):
                return False
        return True

    def _on_cache(self, batch: Sequence[Continued]) -> list[Scored]:
        """Shapes: prompts (questions, prompt), rests (continuations, rest), the cache (continuations, prompt)."""
        shared = [one.shared for one in batch]
        width = max(shared)
        ids = torch.full((len(batch), width), self._pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, (one, length) in enumerate(zip(batch, shared, strict=True)):
            ids[row, width - length :] = torch.tensor(one.wholes[0][:length])
            mask[row, width - length :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        ids, mask, positions = (tensor.to(self._device) for tensor in (ids, mask, positions))
        output = self._model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        first = output.logits[:, -1:].float()  # (questions, 1, vocabulary)
        owners = [row for row, one in enumerate(batch) for _ in one.wholes]
        rests = [whole[length:] for one, length in zip(batch, shared, strict=True) for whole in one.wholes]
        starts = [one.start - length for one, length in zip(batch, shared, strict=True) for _ in one.wholes]
        owner = torch.tensor(owners, device=self._device)
        if (longest := max(map(len, rests))) > 1:
            rest_ids = torch.full((len(rests), longest - 1), self._pad, device=self._device)
            for row, rest in enumerate(rests):
                rest_ids[row, : len(rest) - 1] = torch.tensor(rest[:-1], dtype=torch.long)
            cache = output.past_key_values
            cache.batch_select_indices(owner)
            places = torch.arange(longest - 1, device=self._device)
            later = self._model(
                input_ids=rest_ids,
                # Padding behind a rest is seen by nothing that counts: attention is causal.
                attention_mask=torch.cat([mask[owner], torch.ones_like(rest_ids)], dim=1),
                position_ids=positions[owner, -1:] + 1 + places,
                past_key_values=cache,
                use_cache=True,
            ).logits
        else:
            later = first.new_zeros((len(rests), 0, first.shape[-1]))
        step = max(1, _LOGITS // (longest * first.shape[-1]))
        sums: list[float] = []
        for at in range(0, len(rests), step):
            rows = slice(at, at + step)
            logits = torch.cat([first[owner[rows]], later[rows].float()], dim=1)
            sums += self._sums(logits, rests[rows], starts[rows])
        return _by_question(batch, sums)

    def _whole(self, batch: Sequence[Continued]) -> list[Scored]:
        """Each sequence by itself, in whole: what the other way must agree with."""
        sums: list[float] = []
        sequences = [(one.start, whole) for one in batch for whole in one.wholes]
        longest = max(len(whole) for _, whole in sequences)
        step = max(1, self._most // longest)
        for at in range(0, len(sequences), step):
            part = sequences[at : at + step]
            first = min(start for start, _ in part) - 1
            width = max(len(whole) for _, whole in part)
            ids = torch.full((len(part), width), self._pad)
            for row, (_, whole) in enumerate(part):
                ids[row, : len(whole)] = torch.tensor(whole)
            logits = self._model(
                input_ids=ids.to(self._device),
                position_ids=torch.arange(width, device=self._device).repeat(len(part), 1),
                use_cache=False,
                logits_to_keep=torch.arange(first, width - 1, device=self._device),
            ).logits
            if logits.shape[1] != width - 1 - first:  # some families keep all
                logits = logits[:, first : width - 1]
            rests = [whole[first + 1 :] for _, whole in part]
            sums += self._sums(logits.float(), rests, [start - first - 1 for start, _ in part])
        return _by_question(batch, sums)

    def _sums(self, logits: torch.Tensor, rests: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
        """The summed log-probability of each row's tokens from its start on; `logits` (rows, longest rest, vocabulary).

        `logits[:, i]` are those before token i of a rest.
        """
        targets = torch.full(logits.shape[:2], -100)
        for row, (rest, start) in enumerate(zip(rests, starts, strict=True)):
            targets[row, start : len(rest)] = torch.tensor(rest[start:])
        flat = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().to(logits.device), ignore_index=-100, reduction="none"
        )
        return (-flat.view(targets.shape).double().sum(dim=1)).tolist()


def _by_question(batch: Sequence[Continued], sums: Sequence[float]) -> list[Scored]:
    found, at = [], 0
    for one in batch:
        own = tuple(sums[at : at + len(one.wholes)])
        found.append(Scored(one.id, own, tuple(len(whole) - one.start for whole in one.wholes)))
        at += len(one.wholes)
    return found
