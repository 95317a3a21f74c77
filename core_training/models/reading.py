"""A look at how a model reads a row of tokens: whether ahead, from which position on, and past where one starts again.

A gradient is asked, not a difference: it is exactly 0 where a mask is between two tokens, whatever the type and size of
the weights. The model must hold its weights unquantised; it is left as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from core_training.foundation.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 4
_CLOSE = 1e-2


@dataclass(frozen=True)
class Reading:
    """What is known of a model's way to read."""

    keeps_examples_apart: bool
    """Whether nothing of a packed row's first example reaches the logits of its second.

    Models that build their mask from the positions keep them apart, where these start again at 0. Others (OPT, BLOOM,
    and all with state-space or convolution layers) would let an example see those before it in its row.
    """


def reading_of(model: PreTrainedModel, where: str) -> Reading:
    """How the model reads. Raises InputError, which begins with `where`, for one that cannot learn the next token.

    Encoders that transformers also gives an output layer read ahead, and some count positions from another number.
    """
    embedded: list[torch.Tensor] = []

    def keep(_module: PreTrainedModel, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # some models write into it

    row = torch.arange(2 * _LENGTH, device=model.device).unsqueeze(0)
    training = model.training
    model.eval()  # no dropout between two looks
    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=row, position_ids=row % _LENGTH, use_cache=False).logits.float()
            halves = [part.square().sum() for part in (logits[:, :_LENGTH], logits[:, _LENGTH:])]
            gradients = [torch.autograd.grad(half, embedded, retain_graph=True)[0] for half in halves]
        with torch.no_grad():
            given, own = (model(input_ids=row, use_cache=False, **more).logits for more in ({"position_ids": row}, {}))
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
