"""Where an answer ends: one notion of it for sampling, talking, and the files that others generate with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from core_training.models.chat_template import ChatTemplate


def end_tokens(model: PreTrainedModel, template: ChatTemplate) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos, and those of the model's configurations and its template.

    Many models close a turn with another token than eos (`<end_of_turn>`, `<|eot_id|>`, `<|im_end|>`), and name it in
    their generation_config.json alone.
    """
    configs = (model.config.get_text_config(), model.config)
    configured = [getattr(config, "eos_token_id", None) for config in configs]  # some have none at all
    if (generation := getattr(model, "generation_config", None)) is not None:
        configured.append(generation.eos_token_id)
    known = [
        template.tokenizer.eos_token_id,
        *(one for value in configured for one in _listed(value)),
        template.turn_end,
    ]
    return list(dict.fromkeys(int(token) for token in known if token is not None))


def opening_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text with the tokens that a tokenizer puts before it, and without the end that some put behind it."""
    ids = list(tokenizer(text)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def generation_settings(model: PreTrainedModel, ends: list[int]) -> str:
    """The content of a generation_config.json: the model's own, and all the tokens that end an answer."""
    generation = getattr(model, "generation_config", None)
    own: dict[str, Any] = json.loads(generation.to_json_string()) if generation is not None else {}
    return json.dumps({**own, "eos_token_id": ends if len(ends) > 1 else ends[0]}, indent=2, sort_keys=True) + "\n"


@contextmanager
def own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """The model without its own generation_config.json.

    It fills in whatever a call leaves unset, which would make another policy than the one trained; and one that
    contradicts itself, as some published ones do, cannot be saved.
    """
    from transformers import GenerationConfig

    own: Any = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _listed(value: int | Iterable[int] | None) -> Iterable[int]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value
