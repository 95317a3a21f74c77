"""Answers in words: left-padded batches sorted by length on the KV cache, the same whenever they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from core_training.foundation.errors import RunError
from core_training.models.endings import own_settings_aside
from core_training.models.heads import innermost
from evaluation.answers.subjects import Subject
from evaluation.items import Sampling, Written

_ON_A_CPU, _ON_A_GPU = 2**13, 2**17
"""Tokens of a batch's cache, prompts and answers, padding included."""
_ROWS = 64
_CLOSE = 1e-2
"""Of the largest logit: low precision rounds, and padding that is read changes much more."""


@contextmanager
def _generating() -> Iterator[None]:
    """Have generation fail as a run does."""
    try:
        with torch.inference_mode():
            yield
    except Exception as error:  # memory may run out, and a family's own code fail
        said = str(error).partition("\n")[0]
        raise RunError(f"transformers' generate failed: {type(error).__name__}: {said[:200]}") from error


@dataclass(frozen=True)
class _Batch:
    ids: tuple[str, ...]
    samples: tuple[int, ...]


class Writer:
    """A model that writes answers to prompts."""

    def __init__(self, subject: Subject, sampling: Sampling) -> None:
        self._subject = subject
        self._sampling = sampling
        self._pad = int(subject.tokenizer.pad_token_id or 0)
        self._ends = subject.base.end_tokens
        self.cut = 0
        """The prompts that lost their beginning, for which there was no room."""

    def written(
        self, prompts: Mapping[str, Sequence[int]], known: Collection[tuple[str, int]] = ()
    ) -> Iterator[list[Written]]:
        """Answers to prompts (tokens by identifier), batch by batch, without those that are `known`.

        Batches are made of all prompts, and draws begin anew with each, so that an evaluation that was interrupted
        goes on to the answers of one that was not. Raises RunError where generation fails.
        """
        room = self._subject.context - self._sampling.max_tokens
        fitting = {}
        for name, prompt in prompts.items():
            self.cut += len(prompt) > max(1, room)
            fitting[name] = list(prompt[-max(1, room) :])
        if (pads := self._subject.reads_past_padding) is None:
            pads = self._subject.reads_past_padding = self._reads_past_padding(fitting)
        for batch in self._batches(fitting, pads=pads):
            wanted = [key for key in zip(batch.ids, batch.samples, strict=True) if key not in known]
            if wanted:
                answers = self._answers(batch, fitting)
                yield [one for one in answers if (one.id, one.sample) in set(wanted)]

    def _reads_past_padding(self, prompts: Mapping[str, Sequence[int]]) -> bool | None:
        """Whether the shortest prompt has the same next token's logits beside the longest as alone.

        Models with a state and no mask (RWKV) take padding for words: they get prompts of one length at a time.
        """
        if len({len(prompt) for prompt in prompts.values()}) < 2:
            return None  # nobody is padded
        shortest, longest = (prompts[pick(prompts, key=lambda name: len(prompts[name]))] for pick in (min, max))
        beside, alone = self._next_logits([longest, shortest])[1], self._next_logits([shortest])[0]
        return bool((beside - alone).abs().max() <= _CLOSE * alone.abs().max().clamp(min=1.0))

    def _next_logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits of the first token of each answer, shape (prompts, vocabulary)."""
        ids, mask = self._padded(prompts)
        model: Any = self._subject.model
        config = self._config(ids.shape[1])
        config.max_new_tokens, config.output_logits, config.return_dict_in_generate = 1, True, True
        with _generating(), own_settings_aside(innermost(model)):
            told = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        logits: torch.Tensor = told.logits[0].float()
        return logits

    def _batches(self, prompts: Mapping[str, Sequence[int]], *, pads: bool | None) -> Iterator[_Batch]:
        """Longest prompts first, so that what does not fit is known at once."""
        most = _ON_A_CPU if self._subject.device.type == "cpu" else _ON_A_GPU
        keys = [
            (name, sample)
            for name in sorted(prompts, key=lambda name: (-len(prompts[name]), name))
            for sample in range(self._sampling.samples)
        ]
        at = 0
        while at < len(keys):
            width = len(prompts[keys[at][0]]) + self._sampling.max_tokens
            rows = keys[at : at + max(1, min(_ROWS, most // width))]
            if pads is False:
                rows = [key for key in rows if len(prompts[key[0]]) == len(prompts[keys[at][0]])]
            yield _Batch(tuple(name for name, _ in rows), tuple(sample for _, sample in rows))
            at += len(rows)

    def _answers(self, batch: _Batch, prompts: Mapping[str, Sequence[int]]) -> list[Written]:
        ids, mask = self._padded([prompts[name] for name in batch.ids])
        width = ids.shape[1]
        self._seed(batch)
        model: Any = self._subject.model
        more: dict[str, Any] = {}
        if self._sampling.stop:
            more = {"stop_strings": list(self._sampling.stop), "tokenizer": self._subject.tokenizer}
        with _generating(), own_settings_aside(innermost(model)):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=self._config(width), **more)
        return [
            self._answer(name, sample, new.tolist())
            for name, sample, new in zip(batch.ids, batch.samples, output[:, width:].cpu(), strict=True)
        ]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts with padding on the left, and the mask of what is none; both (prompts, longest)."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self._subject.device), mask.to(self._subject.device)

    def _seed(self, batch: _Batch) -> None:
        """Begin the draws of a batch where its seed and its first prompt say."""
        if self._sampling.temperature > 0:
            words = f"{self._sampling.seed}\n{batch.ids[0]}\n{batch.samples[0]}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") % 2**63)

    def _config(self, width: int) -> Any:
        from transformers import GenerationConfig

        draws: dict[str, Any] = {"do_sample": False}
        if self._sampling.temperature > 0:
            draws = {"do_sample": True, "temperature": self._sampling.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=max(1, min(self._sampling.max_tokens, self._subject.context - width)),
            eos_token_id=self._ends,
            pad_token_id=self._pad,
            use_cache=True,
            **draws,
        )

    def _answer(self, name: str, sample: int, new: Sequence[int]) -> Written:
        end = next((place for place, token in enumerate(new) if token in self._ends), None)
        said = list(new if end is None else new[:end])
        text = str(self._subject.tokenizer.decode(said, skip_special_tokens=True))
        ended, tokens = end is not None, len(said) + (end is not None)
        for stop in self._sampling.stop:
            if (place := text.find(stop)) >= 0:
                text, ended = text[:place], True
        if not ended:  # rows that stopped early are padded behind a stop text
            tokens = len(said)
        return Written(name, sample, text.strip(), tokens, ended)
