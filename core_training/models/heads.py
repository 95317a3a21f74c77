"""The output layers that stages add to a language model: a score for reward models, a value for PPO's critic.

Both give one number per token. They are float32 whatever the model is, are trained in every tuning mode, and travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from core_training.data.examples import IGNORED, Batch
from core_training.foundation.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

VALUE_HEAD = "value_head"


class Head(nn.Linear):
    """A linear layer to one number, computed in its own dtype: bfloat16 keeps but three digits of a reward."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__(width, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def with_score_head(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A causal language model's layers as a sequence classifier with one label, its `score` drawn from `seed`.

    It is the classifier that transformers has of this architecture, or one of our own; `end_scores` reads it.
    """
    from transformers import AutoModelForSequenceClassification

    from core_training.models.scored_model import ScoredModel

    config, width = model.config, _width(model)
    config.num_labels = 1
    try:
        with torch.device("meta"):  # nothing of it is kept but its forward
            classifier: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        classifier = None
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        # Some models (Llama 4's text) call their layers otherwise than they say.
        config.scored_layers = next(n for n in (model.base_model_prefix, "model") if hasattr(model, n))
        try:
            with torch.device("meta"):
                classifier = ScoredModel(config)
        except ValueError:
            raise InputError(
                f"stage: transformers has no {type(model).__name__} without its output layer, so there is no place for "
                "a score; name another model"
            ) from None
    layers = getattr(config, "scored_layers", model.base_model_prefix)
    setattr(classifier, classifier.base_model_prefix, getattr(model, layers))
    score = Head(width, bias=False)
    # A score of zeros would leave the layers below without a gradient; this is the spread of the model's own layers.
    spread = getattr(config, "initializer_range", 0.02)  # OPT's configuration has none
    nn.init.normal_(score.weight, std=spread, generator=torch.Generator().manual_seed(seed))
    classifier.score = score
    return cast("PreTrainedModel", classifier)


def end_scores(model: nn.Module, score: nn.Module, batch: Batch) -> torch.Tensor:
    """The score of each sequence at its last labelled token, shape (sequences,); `score` is the head inside `model`.

    Classifiers of transformers look for the last token that is no padding, which many models have no token for.
    """
    scores: list[torch.Tensor] = []
    watch = score.register_forward_hook(lambda _, inputs, output: scores.append(output))
    try:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        watch.remove()
    rows = torch.arange(len(batch["labels"]), device=batch["labels"].device)
    return scores[0][rows, last_labelled(batch["labels"])].squeeze(-1).float()


def last_labelled(labels: torch.Tensor) -> torch.Tensor:
    """The place of the last labelled token in each row, shape (rows,)."""
    places = torch.arange(labels.shape[1], device=labels.device)
    return ((labels != IGNORED) * places).argmax(dim=1)


def add_value_head(model: PreTrainedModel) -> None:
    """Give the causal language model inside `model` a trainable `value_head`, which its forward does not use.

    It starts at zero: the first values are then those of a critic that knows nothing, whatever the model's width, and
    the value loss reaches the policy's layers only once the head has learnt something. Its own gradient is not zero.
    """
    inner = innermost(model)
    inner.value_head = Head(_width(inner), bias=True)
    nn.init.zeros_(inner.value_head.weight)
    nn.init.zeros_(inner.value_head.bias)


def remove_value_head(model: PreTrainedModel) -> None:
    """Undo `add_value_head`, where it was done."""
    inner = innermost(model)
    if hasattr(inner, VALUE_HEAD):
        del inner.value_head


def innermost(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model, without what PEFT puts around it."""
    inner = cast("PeftModel", model).get_base_model() if hasattr(model, "peft_config") else model
    return cast("PreTrainedModel", inner)


def _width(model: PreTrainedModel) -> int:
    """The width of what the output layer is given. Raises InputError where the configuration does not say it."""
    if (width := getattr(model.config.get_text_config(), "hidden_size", None)) is None:
        raise InputError(
            f"stage: the configuration of a {type(model).__name__} does not state its width (hidden_size), so there is "
            "no place for a head; name another model"
        )
    return int(width)
