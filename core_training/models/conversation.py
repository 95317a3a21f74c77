"""A conversation with a causal language model: turns in, tokens out, the oldest turns forgotten when there is no room.

Knows nothing of terminals or run folders. A model without a chat template continues each text instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import TextStreamer, set_seed

from core_training.foundation.errors import InputError, RunError
from core_training.models.base_model import BaseModel
from core_training.models.context import context_length
from core_training.models.endings import opening_tokens
from core_training.models.reading import check_writes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token. `temperature` 0 takes the likeliest one each time."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The model's words, and the number of their tokens; `ended` is False where `max_tokens` cut it off."""

    text: str
    tokens: int
    ended: bool


class Conversation:
    """The turns so far, and the model that takes the other part."""

    def __init__(self, base: BaseModel, sampling: Sampling) -> None:
        """Raises InputError where the model cannot write."""
        self._model: Any = base.model  # PEFT's generates, too
        self._tokenizer = base.tokenizer
        self._ends = base.end_tokens
        self._base = base
        self._sampling = sampling
        self._turns: list[dict[str, str]] = []
        check_writes(self._model, "chat", prompts=1)
        set_seed(sampling.seed)

    @property
    def has_template(self) -> bool:
        return self._base.chat_template.exists

    def reply(self, text: str, on_text: Callable[[str], None] = lambda _: None) -> Answer:
        """The model's answer to `text`; `on_text` gets it piece by piece, in whole words.

        Raises InputError when the text is empty or leaves no room for an answer, RunError where generation fails.
        """
        if not text.strip():
            raise InputError("the prompt is empty")
        ids, turns = self._fit([*self._turns, {"role": "user", "content": text}])
        output = self._continued(ids, on_text)
        new = output[0, ids.shape[1] :].tolist()
        ended = bool(new) and new[-1] in self._ends
        said = new[:-1] if ended else new
        answer = Answer(cast(str, self._tokenizer.decode(said, skip_special_tokens=True)).strip(), len(new), ended)
        if self.has_template:
            self._turns = [*turns, {"role": "assistant", "content": answer.text}]
        return answer

    def _continued(self, ids: torch.Tensor, on_text: Callable[[str], None]) -> torch.Tensor:
        """The tokens and the answer's, shape (1, length)."""
        settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self._sampling.temperature > 0:
            settings = {"do_sample": True, "temperature": self._sampling.temperature}
        try:
            with torch.inference_mode():
                output: torch.Tensor = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(self._sampling.max_tokens, self._context - ids.shape[1]),
                    pad_token_id=self._tokenizer.pad_token_id,
                    eos_token_id=self._ends,
                    streamer=_Streamer(self._tokenizer, on_text),
                    **settings,
                )
        except Exception as error:  # memory may run out
            said = str(error).partition("\n")[0]
            raise RunError(f"transformers' generate failed: {type(error).__name__}: {said[:200]}") from error
        return output

    @property
    def _context(self) -> int:
        return context_length(self._model)

    def _fit(self, turns: list[dict[str, str]]) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """The turns' tokens, shape (1, length), without the oldest turns that leave no room for an answer."""
        while True:
            ids = self._encode(turns)
            self._base.check_tokens(np.array(ids), "the prompt")
            if len(ids) < self._context:
                return torch.tensor([ids], device=self._model.device), turns
            if len(turns) == 1:
                raise InputError(f"the prompt has {len(ids)} tokens; this model takes {self._context - 1} at the most")
            turns = turns[2:]

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        if not self.has_template:
            return opening_tokens(turns[-1]["content"], self._tokenizer)
        text = self._base.chat_template.text(turns, to_answer=True)
        return list(self._tokenizer.encode(text, add_special_tokens=False))


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
