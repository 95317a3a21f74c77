"""A look at what a model says, before and after it is turned into another form: it has to be the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import nn

from core_training.foundation.errors import RunError
from core_training.models.heads import innermost
from core_training.models.padding import loading_empties_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_TOKENS = 12
_TOLERANCE = {torch.float32: 1e-3}
_COARSE = 5e-2
"""Of a model in fewer digits, whose merged weights are rounded again."""


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """The model's logits, float32, of a few tokens spread over its vocabulary."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    tokens = (torch.arange(1, _TOKENS + 1) * 7919 % vocabulary).unsqueeze(0).to(model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.float().cpu()
    finally:
        model.train(training)


def check_alike(before: torch.Tensor, model: PreTrainedModel, what: str) -> None:
    """Raise RunError where the model's logits are no longer those of `before`; `what` is what was done to it."""
    after = logits_of(model)
    alike = (after == before) | (after.isnan() & before.isnan())  # infinities, and a model that has diverged
    far = float((after - before).masked_fill(alike, 0.0).abs().max())
    most = _TOLERANCE.get(model.dtype, _COARSE) * (1 + float(before.abs().max()))
    if not far <= most:
        raise RunError(
            f"{what} changed what the model says: logits of the same tokens differ by {far:.2g}, more than {most:.2g}. "
            f"This is a fault of fedloom or of a library: please report it, with the name {type(model).__name__}"
        )


def has_room_for(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the model can be loaded from this folder once more; where it cannot, that is said."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if psutil.virtual_memory().available < 2 * size:
        _log.warning(
            "%s is not loaded again to be compared with the model in memory: too little memory is free", folder
        )
        return False
    return True


def check_adapter(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Load an adapter's folder on its base as it lies on disk; raise RunError where that does not say the same."""
    from peft import PeftModel

    inner = innermost(model)
    kind: Any = type(inner)
    config = type(inner.config).from_pretrained(base, local_files_only=True)
    config.num_labels = inner.config.num_labels or 1
    if not loading_empties_padding(inner):
        config.pad_token_id = inner.config.pad_token_id
    if isinstance(scored := getattr(inner.config, "scored_layers", None), str):
        config.scored_layers = scored
    plain = kind.from_pretrained(
        base, config=config, dtype=model.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if cast(nn.Embedding, plain.get_input_embeddings()).weight.shape[0] != rows:
        plain.resize_token_embeddings(rows, mean_resizing=False)
    written = cast("PreTrainedModel", PeftModel.from_pretrained(plain, str(folder)))
    check_alike(logits_of(model), written, "writing the adapter")


def check_written(model: PreTrainedModel, folder: Path) -> None:
    """Load what was written of a plain transformers model, and raise RunError where it does not say the same.

    A model too large for the memory that is free is not looked at, which is said.
    """
    if not has_room_for(model, folder):
        return
    config = type(model.config).from_pretrained(folder, local_files_only=True)
    written = type(model).from_pretrained(
        folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    check_alike(logits_of(model), written, "writing the model")
