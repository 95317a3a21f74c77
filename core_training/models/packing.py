"""A test of whether a model keeps packed examples apart.

Models that build their mask from the positions do, where these start again at 0. Others (OPT, BLOOM, and all with
state-space or convolution layers) would let an example see those before it in its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 4


def keeps_examples_apart(model: PreTrainedModel) -> bool:
    """Whether nothing of a packed row's first example reaches the logits of its second.

    Asked is the gradient of these logits by the first example's embedded tokens: it is exactly 0 where a mask is
    between them, whatever the type and size of the weights. The model must hold its weights unquantised; it is left
    as it was.
    """
    embedded: list[torch.Tensor] = []

    def keep(_module: PreTrainedModel, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            row = torch.arange(2 * _LENGTH, device=model.device).unsqueeze(0)
            logits = model(input_ids=row, position_ids=row % _LENGTH, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[:, _LENGTH:].float().square().sum(), embedded)
    finally:
        hook.remove()
    return not gradient[:, :_LENGTH].any()
