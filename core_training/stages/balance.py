"""The loss that keeps a mixture of experts in balance (Fedus et al. 2022)."""

from __future__ import annotations

from typing import Any, cast

import torch

from core_training.data.examples import Batch
from core_training.foundation.errors import InputError
from core_training.models.heads import last_labelled

_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "moe_topk", "moe_k", "top_k", "router_top_k", "num_experts_per_token"),
    "top_k_experts",
)


def balance_loss(output: Any, config: Any, batch: Batch) -> torch.Tensor:
    """Experts × the sum over them of their share of the tokens times the router's mean probability, a scalar.

    In perfect balance it is the number of experts that a token has. Over all layers and the tokens up to each
    sequence's last label, as behind it is padding. `output` is of a forward with `output_router_logits`. Raises
    InputError for a model that gives no router's scores.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = tuple(layer for layer in getattr(output, "router_logits", None) or () if layer is not None)
    if not scores:
        raise InputError(
            f"model.router_aux_loss_coef: a {config.model_type} model does not give its router's scores; leave it out"
        )
    labels = batch["labels"]
    read = torch.arange(labels.shape[1], device=labels.device) <= last_labelled(labels).unsqueeze(1)
    text = config.get_text_config()
    chosen = next((getattr(text, name) for name in _EXPERTS_PER_TOKEN if hasattr(text, name)), None)
    if chosen is None:
        raise InputError(
            f"model.router_aux_loss_coef: a {config.model_type} model does not say how many experts a token has; leave "
            "it out"
        )
    logits: tuple[Any, ...] = tuple(map(_logits, scores))
    return cast(torch.Tensor, load_balancing_loss_func(logits, logits[0].shape[-1], chosen, read.long()))


def _logits(scores: torch.Tensor) -> torch.Tensor:
    """A router's scores as logits, shape (tokens, experts): some routers, as Gemma 4's, give probabilities."""
    given = scores.detach()
    if bool((given >= 0).all()) and torch.allclose(given.sum(dim=-1), torch.ones_like(given[..., 0]), atol=1e-3):
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    return scores
