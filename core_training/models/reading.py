"""A look at how a model reads a row of tokens: whether ahead, from which position on, and past where one starts again.

A gradient is asked, not a difference: it is exactly 0 where a mask is between two tokens, whatever the type and size of
the weights. The model must hold its weights unquantised; it is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from core_training.foundation.errors import InputError
from core_training.models.endings import own_settings_aside
from core_training.models.heads import innermost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 4
_CLOSE = 1e-2
_ON_A_GPU_ALONE = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""What no CPU has the backward of."""


@dataclass(frozen=True)
class Reading:
    """What is known of a model's way to read."""

    keeps_examples_apart: bool
    """Whether nothing of a packed row's first example reaches the logits of its second.

    Models that build their mask from the positions keep them apart, where these start again at 0. Others (OPT, BLOOM,
    and all with state-space or convolution layers) would let an example see those before it in its row.
    """


def reading_of(model: PreTrainedModel, where: str, rows: int = 2) -> Reading:
    """How the model reads batches of so many rows: FlashAttention in transformers heeds a lone row's positions only.

    Raises InputError, which begins with `where`, for a model that cannot learn the next token. Encoders that
    transformers also gives an output layer read ahead, some count positions from another number, and what is to help
    another model along reads that one's states.
    """
    embedded: list[torch.Tensor] = []

    def keep(_module: PreTrainedModel, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # some models write into it

    training = model.training
    model.eval()  # no dropout between two looks
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with _where_it_computes(model):
            batch = _tokens(model, 2 * _LENGTH).repeat(rows, 1)
            positions = torch.arange(2 * _LENGTH, device=model.device).repeat(rows, 1)
            with torch.enable_grad():
                logits = model(input_ids=batch, position_ids=positions % _LENGTH, use_cache=False).logits.float()
                halves = [part.square().sum() for part in (logits[:, :_LENGTH], logits[:, _LENGTH:])]
                gradients = [torch.autograd.grad(half, embedded, retain_graph=True)[0] for half in halves]
            with torch.no_grad():
                given, own = (
                    model(input_ids=batch, use_cache=False, **more).logits for more in ({"position_ids": positions}, {})
                )
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: a {type(model).__name__} reads something else than tokens: {_first_line(error)}; name a "
            "language model"
        ) from None
    except AssertionError as error:  # Reformer computes its layers backwards, from dropout's random state
        raise InputError(
            f"{where}: a {type(model).__name__} has no gradient without dropout: {_first_line(error)}; name another "
            "model"
        ) from None
    finally:
        hook.remove()
        model.train(training)
    if gradients[0][:, _LENGTH:].any():
        raise InputError(
            f"{where}: a {type(model).__name__} reads ahead, as encoders do (is_decoder: false in its config.json), so "
            "it cannot learn to write; name a language model"
        )
    if (own - given).abs().max() > _CLOSE * own.abs().max():
        raise InputError(
            f"{where}: a {type(model).__name__} counts a text's positions from another number than 0, which is not "
            "supported; name another model"
        )
    return Reading(keeps_examples_apart=not gradients[1][:, :_LENGTH].any())


def check_writes(model: PreTrainedModel, what: str, prompts: int = 2) -> None:
    """Have the model write two tokens after so many prompts, of which the first is the longest.

    Raises InputError, which begins with `what`, where it cannot: of some families transformers' own code fails.
    """
    from transformers import GenerationConfig

    tokens = _tokens(model, _LENGTH).repeat(prompts, 1)
    mask = torch.ones_like(tokens)
    mask[1:, 0] = 0  # the padding is on the left
    config = GenerationConfig(do_sample=False, max_new_tokens=2, pad_token_id=int(tokens[0, 0]))
    with _where_it_computes(model), own_settings_aside(innermost(model)):
        try:
            model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        except Exception as error:  # it may raise anything
            raise InputError(
                f"{what}: a {type(innermost(model)).__name__} cannot write here: transformers' generate failed: "
                f"{type(error).__name__}: {_first_line(error)}"
            ) from None


def _tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    """So many tokens, shape (count,), without the padding: some models count no position for it."""
    padding = {model.config.get_text_config().pad_token_id, getattr(model.get_input_embeddings(), "padding_idx", None)}
    kept = [token for token in range(count + len(padding)) if token not in padding]
    return torch.tensor(kept[:count], device=model.device)


@contextmanager
def _where_it_computes(model: PreTrainedModel) -> Iterator[None]:
    """Have the model on a device that its attention can train on. Raises InputError where there is none."""
    attention = model.config._attn_implementation
    if attention not in _ON_A_GPU_ALONE:
        yield
        return
    if not torch.cuda.is_available():
        raise InputError(f"model.attn_implementation: {attention} cannot train without a GPU; leave it out")
    device = model.device
    model.to("cuda")  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to(device)  # type: ignore[arg-type]  # weights are quantised on the CPU


def _first_line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return said[:200] or type(error).__name__
