"""Engines for the trials of a search, opened one after the other on one base model, which is loaded once.

The model is loaded anew for a trial whose values change what is loaded (another rank of LoRA, say), after the one
before was let go of. Records are tokenised once for all trials that read them alike.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from core_training.recipe.schema import Recipe
from experiments.digests import digest_of

if TYPE_CHECKING:
    from core_training.engine.dataset import Dataset
    from core_training.engine.engine import Engine
    from core_training.models.base_model import BaseModel

OF_STEPS = frozenset(
    {
        *("learning_rate", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
        *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "weight_decay", "max_grad_norm"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "per_device_eval_batch_size"),
        *("save_steps", "eval_steps", "logging_steps", "report_to", "load_best_model_at_end", "keep_optimizer"),
    }
)
"""Keys of `training` that say how steps are taken and told, and nothing of the model or the records."""

_ROWS_LOOKED_AT = 2
"""Rows of a batch on which a model is tried when it is loaded; more are like two."""


class Engines:
    """Opens the engine of one trial at a time; use it from one thread."""

    def __init__(self) -> None:
        self._base: BaseModel | None = None
        self._data: Dataset | None = None
        self._keys = ("", "")

    @contextmanager
    def opened(self, recipe: Recipe) -> Iterator[Engine]:
        """The recipe's engine, closed when the block ends. Raises InputError for a model or data that do not fit."""
        from core_training.engine.dataset import load_dataset
        from core_training.engine.engine import Engine
        from core_training.engine.failures import explained
        from core_training.foundation.environment import train_alone
        from core_training.models.base_model import BaseModel
        from core_training.models.libraries import settle_libraries
        from core_training.stages.base import load_stage

        settle_libraries()
        train_alone()
        keys = (_base_key(recipe), _data_key(recipe))
        if self._base is not None and (keys[0] != self._keys[0] or self._base.changed_buffers()):
            self.close()
        with explained("loading the model and its data", recipe):
            if self._base is None:
                self._base = BaseModel(recipe)
            stage = load_stage(recipe, self._base)
            if self._data is None or keys[1] != self._keys[1]:
                self._data = load_dataset(recipe, stage)
        self._keys = keys
        engine = Engine(stage, self._data)
        try:
            yield engine
        finally:
            engine.close()

    def close(self) -> None:
        """Let go of the model, before another is loaded; the records stay."""
        self._base = None
        gc.collect()  # it is part of circles


def _base_key(recipe: Recipe) -> str:
    """What of a recipe the loaded and tuned model depends on."""
    training = _without_steps(recipe)
    training["per_device_train_batch_size"] = min(recipe.training.per_device_train_batch_size, _ROWS_LOOKED_AT)
    document = recipe.model_dump(mode="json", include={"model", "stage", "tuning", "deepspeed"})
    return digest_of([document, training])


def _data_key(recipe: Recipe) -> str:
    """What of a recipe its tokenised records depend on: all but the tuning, and how steps are taken."""
    left_out = {"output", "tuning", "training", "topology", "aggregation", "simulation"}
    return digest_of([recipe.model_dump(mode="json", exclude=left_out), _without_steps(recipe)])


def _without_steps(recipe: Recipe) -> dict[str, Any]:
    return recipe.training.model_dump(mode="json", exclude=set(OF_STEPS))
