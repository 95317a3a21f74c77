"""Sampling answers from the policy, in the layout that training reads. Knows nothing of rewards or losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy.typing as npt
import torch

from core_training.data.examples import IGNORED, Batch
from core_training.data.rows import COLUMNS
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.endings import own_settings_aside
from core_training.models.heads import innermost
from core_training.parts.stages.rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampler:
    """The settings for drawing answers; `stop_ids` are the tokens that end one."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop_ids: list[int]
    pad_token_id: int

    @staticmethod
    def of(settings: Rollout, base: BaseModel) -> Sampler:
        """The recipe's sampler. Raises InputError when `rollout.stop` names what is no token of the tokenizer."""
        stop = [*base.end_tokens, *(_token_id(text, base.tokenizer) for text in settings.stop)]
        padding = base.tokenizer.pad_token_id
        return Sampler(settings.max_new_tokens, settings.temperature, settings.top_p, stop, padding)

    def sample(self, model: PreTrainedModel, prompts: Batch, generations: int = 1) -> dict[str, torch.Tensor]:
        """Answers to right-padded prompts, `generations` to each, next to each other.

        Draws from torch's global generator. Returns a batch in the layout of `core_training.data.rows`: prompt, answer,
        padding, with labels on the answer (its closing token too); and `ended` (answers,): whether a stop token came.
        """
        ids = prompts["input_ids"].repeat_interleave(generations, dim=0)
        lengths = prompt_lengths(prompts).repeat_interleave(generations)
        width = ids.shape[1]
        columns = torch.arange(width, device=ids.device)
        shift = (width - lengths).unsqueeze(1)  # generation wants the padding on the left
        inner: Any = innermost(model)
        with own_settings_aside(inner):
            output = inner.generate(
                input_ids=ids.gather(1, (columns - shift) % width),
                attention_mask=(columns >= shift).long(),
                generation_config=self._config(),
            )
        new = output[:, width:]
        stops = torch.isin(new, torch.tensor(self.stop_ids, device=new.device))
        kept = stops.long().cumsum(dim=1) - stops.long() == 0
        totals = lengths + kept.sum(dim=1)
        columns = torch.arange(output.shape[1], device=ids.device)
        moved = output.gather(1, (columns + shift) % output.shape[1])[:, : int(totals.max())]
        columns = columns[: moved.shape[1]]
        answered = (columns >= lengths.unsqueeze(1)) & (columns < totals.unsqueeze(1))
        judged_by = {COLUMNS: prompts[COLUMNS].repeat_interleave(generations, dim=0)} if COLUMNS in prompts else {}
        return {
            **judged_by,
            "input_ids": moved.masked_fill(columns >= totals.unsqueeze(1), self.pad_token_id),
            "labels": moved.masked_fill(~answered, IGNORED),
            "position_ids": columns.repeat(len(moved), 1),
            "ended": stops.any(dim=1),
        }

    def _config(self) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_token_id,
            top_k=0,  # all tokens; unset, it would be 50
            # A policy that has diverged is found out by its loss; to draw from NaN would end the process.
            remove_invalid_values=True,
        )


def prompt_lengths(prompts: Batch) -> torch.Tensor:
    """Tokens of each right-padded prompt; all but the first of a prompt's tokens have labels."""
    columns = torch.arange(prompts["labels"].shape[1], device=prompts["labels"].device)
    return ((prompts["labels"] != IGNORED) * columns).amax(dim=1) + 1


def texts(answers: Batch, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Prompts and completions of sampled answers, without special tokens and without the token that ended them."""
    prompts, completions = [], []
    for ids, labels, ended in zip(answers["input_ids"], answers["labels"], answers["ended"], strict=True):
        places = (labels != IGNORED).nonzero().squeeze(1)
        stop = int(places[-1]) + (0 if ended else 1)
        prompts.append(plain_text(ids[: places[0]], tokenizer))
        completions.append(plain_text(ids[places[0] : stop], tokenizer))
    return prompts, completions


def plain_text(ids: torch.Tensor | npt.NDArray[Any] | list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one sequence of tokens, without special ones."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def _token_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return int(vocabulary[text])
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(
            f"rollout.stop: {text!r} is {len(ids)} tokens to this model's tokenizer; name single tokens of it"
        )
    return int(ids[0])
