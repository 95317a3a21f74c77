"""What a run will take of a CPU's memory at most, from its recipe and the shapes of its model: nothing is loaded.

Counted are the tensors that live at the same time, as PyTorch keeps them for a backward pass, and what glibc's heap
holds beside them. Rows are taken as full and labelled all over. See docs/results.md for how near it comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.models.context import TOKENS_AT_ONCE
from core_training.models.shapes import ModelShapes, WeightShape
from core_training.parts.data_kinds import PREFERENCE
from core_training.parts.tuning_modes.freeze import FREEZE
from core_training.parts.tuning_modes.lora import LORA
from core_training.parts.tuning_modes.qlora import QLORA
from core_training.recipe.schema import Recipe

_LIBRARIES = 500 << 20
"""PyTorch's CPU build, transformers, PEFT and fedloom after some steps of a model of next to no size (measured)."""

_KEPT_BY_HEAP = {"float32": 2.05, "bfloat16": 1.5}
"""What glibc 2.36 takes for tensors of up to 32 MB, relative to the most that live at once (measured).

Where a tensor was freed, none of its size fits, as tensors are aligned; in bfloat16 there are smaller ones that do.
"""
_LARGEST_IN_HEAP = 32 << 20

_ITEM = {"float32": 4, "bfloat16": 2}
_FLOAT32 = _ITEM["float32"]
_LOGITS_IN_TRAINING = 3
"""As a backward pass begins, all float32: the softmax, the gradient by it, and the gradient by the logits."""
_LOGITS_IN_EVALUATION = 2
_MOMENTS = {
    **{"sgd": 0.0, "adafactor": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion_32bit": 1.0, "lion_8bit": 0.25},
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 2.0),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 0.5),
}
"""What an optimizer keeps of each trained value, in float32 numbers."""
_WEIGHTS_OF_A_SCALE, _SCALES_OF_A_SCALE = 64, 256


@dataclass(frozen=True)
class Memory:
    """Bytes that a run holds."""

    libraries: int
    weights: int
    """The base's weights, as they are held in training."""
    trained: int
    """Adapters, the state at the start, the optimizer's moments and corrections' states."""
    step: int
    """Gradients, activations and logits; or logits in an evaluation or states in a checkpoint, where they are more."""
    loading: int
    """The base's weights while they are loaded."""

    @property
    def training(self) -> int:
        """The most that is held once the model is loaded."""
        return self.libraries + self.weights + self.trained + self.step

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return max(self.training, self.libraries + self.loading)


def estimated_memory(recipe: Recipe) -> Memory:
    """The memory of a run of this recipe in one process on a CPU. Raises InputError for what it cannot tell."""
    if reason := _not_counted(recipe):
        raise InputError(reason)
    folder = find_model(recipe.model.name_or_path) or Path(recipe.model.name_or_path)
    return ShapedRun(recipe, ModelShapes.of(folder)).memory()


def _not_counted(recipe: Recipe) -> str | None:
    """Why the memory of such a run is not known here, if so."""
    mode, attention, optimizer = recipe.tuning.mode, recipe.model.attn_implementation, recipe.training.optim
    has_other_adapters = recipe.tuning_part.result == "adapter" and LORA.name not in recipe.tuning_part.sections
    reasons = {
        f"stage {recipe.stage} gives answers of its own, whose memory is not counted": recipe.stage_part.samples,
        "a deepspeed group shares it among its processes": recipe.deepspeed.used,
        f"what tuning.mode {mode} takes is not counted": has_other_adapters,
        f"the moments of training.optim {optimizer} are not counted": optimizer not in _MOMENTS,
        f"what attention keeps is counted of sdpa alone, not of {attention}": attention not in (None, "sdpa"),
        "a compiled model keeps what its compiler chooses": recipe.training.torch_compile,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class ShapedRun:
    """A recipe on a model of these shapes. All numbers are bytes, but for sizes, which are elements."""

    def __init__(self, recipe: Recipe, shapes: ModelShapes) -> None:
        self._recipe = recipe
        self._shapes = shapes
        self._item = _ITEM[recipe.model.dtype]
        self._lora = recipe.tuning.settings(LORA)
        self._has_adapters = recipe.tuning_part.result == "adapter"

    def memory(self) -> Memory:
        """All of it."""
        states = 1 + self._moments + self._corrections  # the first is the one at the start, which is remembered
        return Memory(
            libraries=_LIBRARIES,
            weights=self._weights,
            trained=int(_FLOAT32 * (self.adapter_size + self.trained_size * states)),
            step=max(
                self._in_training + _FLOAT32 * self.trained_size,
                self._in_evaluation,
                2 * _FLOAT32 * self.trained_size,  # of a checkpoint: the state, and the same as a file
            ),
            loading=self._loading,
        )

    @cached_property
    def adapter_size(self) -> int:
        """Parameters beside the base: rank × (inputs + outputs) of each adapted matrix, DoRA's magnitudes, copies."""
        if not self._has_adapters:
            return 0
        factors = sum(self._lora.r * sum(weight.shape) for weight in self._adapted)
        magnitudes = sum(weight.shape[0] for weight in self._adapted) if self._lora.use_dora else 0
        whole = self._lora.modules_to_save
        copies = sum(w.size for w in self._shapes.weights if any(w.is_in(name) for name in whole))
        return factors + magnitudes + copies

    @cached_property
    def trained_size(self) -> int:
        """Parameters that are trained."""
        return self.adapter_size + self._trained_in_place

    @cached_property
    def activations_of_a_layer(self) -> int:
        """What a layer keeps of each token for its backward pass, under PyTorch's fused attention."""
        shapes = self._shapes
        inner, leading = shapes.inner
        # Queries, keys, values and what attention makes of them; what stands before the activation function and, with
        # a gate, behind it and beside it.
        kept = self._item * (2 * shapes.queries + 2 * shapes.keys + (3 if leading > 1 else 1) * inner)
        # Norms compute in float32, and keep what they are given.
        kept += _FLOAT32 * (shapes.norms * shapes.hidden + shapes.norms_heads * (shapes.queries + shapes.keys))
        return kept + (self._inputs_of_adapters if self._has_adapters else self._inputs_of_weights)

    @property
    def _inputs_of_adapters(self) -> int:
        """What a layer's adapters keep: their inputs in float32."""
        inner, leading = self._shapes.inner
        adapted = [weight for weight in self._adapted if weight.layer == 0]
        feeding = [weight for weight in adapted if inner in weight.shape]
        down = len(feeding) > leading
        inputs = len(adapted) - down
        if self._item == _FLOAT32:
            # No copies: one input for all that share it, and that of the output's projection is kept in any case.
            inputs = (len(adapted) > len(feeding)) + (len(feeding) > down)
        ranks = self._lora.r * len(adapted)
        return _FLOAT32 * (inputs * self._shapes.hidden + down * inner + ranks)

    @property
    def _inputs_of_weights(self) -> int:
        """What a layer keeps where its weights are trained: the inputs of its matrices, and of its norms' factors."""
        inner, _ = self._shapes.inner
        # Two matrices have inputs that are kept in any case; of the others each makes one of its own in bfloat16.
        inputs = 2 if self._item == _FLOAT32 else len(self._shapes.linear) // self._shapes.layers - 2
        return self._item * (inputs * self._shapes.hidden + inner) + _FLOAT32 * self._shapes.norms * self._shapes.hidden

    @property
    def _in_training(self) -> int:
        """The activations and logits of what is computed together in a step."""
        tokens = self._tokens_at_once(self._recipe.training.per_device_train_batch_size)
        logits = self._logits(tokens, _LOGITS_IN_TRAINING)
        if self._recipe.training.gradient_checkpointing:
            # Layers keep their inputs, and one at a time is computed anew. Freed memory goes back to the system.
            inputs = self._shapes.layers * self._shapes.hidden * self._item
            return tokens * (inputs + self.activations_of_a_layer) + logits
        kept = tokens * self._layers_with_gradient * self.activations_of_a_layer
        return int(_KEPT_BY_HEAP[self._recipe.model.dtype] * kept) + logits

    @property
    def _in_evaluation(self) -> int:
        if self._recipe.data.eval is None and self._recipe.data.eval_fraction == 0:
            return 0
        tokens = self._tokens_at_once(self._recipe.training.per_device_eval_batch_size)
        return self._logits(tokens, _LOGITS_IN_EVALUATION)

    def _logits(self, tokens: int, copies: int) -> int:
        """The logits of so many tokens, and as many tensors like them as live at once."""
        if self._recipe.stage_part.head == "score":
            return 0
        size = _FLOAT32 * tokens * self._shapes.vocabulary
        is_in_heap = size <= _LARGEST_IN_HEAP and not self._recipe.training.gradient_checkpointing
        return int(copies * size * (_KEPT_BY_HEAP[self._recipe.model.dtype] if is_in_heap else 1))

    def _tokens_at_once(self, rows: int) -> int:
        """The tokens that are computed together of a batch of so many full rows; see `data.rows.parts`."""
        most = self._recipe.training.max_length
        row = min(most, self._shapes.context or most) * (2 if self._recipe.stage_part.reads is PREFERENCE else 1)
        is_whole = self._recipe.stage_part.rows_compared is not None
        return row * (rows if is_whole else max(1, min(rows, TOKENS_AT_ONCE // row)))

    @property
    def _layers_with_gradient(self) -> int:
        """The layers from the first trained one on; all of them where something outside is trained."""
        if self._recipe.tuning_part.result != "layers":
            return self._shapes.layers
        first = min((weight.layer or 0 for weight in self._shapes.weights if self._is_left_to_train(weight)), default=0)
        return self._shapes.layers - first

    @property
    def _weights(self) -> int:
        """The base in its type, but for what is trained (float32) and what is quantised."""
        trained = self._trained_in_place
        # A bfloat16 model has weights of its type beside the float32 ones that are trained, for as long as a step.
        rounded = self._item * trained if self._item != _FLOAT32 else 0
        held = self._item * (self._shapes.size - trained) + _FLOAT32 * trained + rounded
        if self._recipe.tuning_part.unquantised is None:
            return held
        quantised = sum(weight.size for weight in self._shapes.linear)
        scales = quantised // _WEIGHTS_OF_A_SCALE
        if self._recipe.tuning.settings(QLORA).double_quant:
            return held - self._item * quantised + quantised // 2 + scales + _FLOAT32 * scales // _SCALES_OF_A_SCALE
        return held - self._item * quantised + quantised // 2 + _FLOAT32 * scales

    @property
    def _loading(self) -> int:
        """The base in its type; a file of another type is in memory beside what is made of it."""
        held = self._item * self._shapes.size
        return held if held == self._shapes.stored_bytes else held + self._shapes.stored_bytes

    @property
    def _moments(self) -> float:
        return _MOMENTS[self._recipe.training.optim]

    @property
    def _corrections(self) -> int:
        """States that FedProx, SCAFFOLD or FedDyn keep, or hold while they train."""
        settings = self._recipe.aggregation
        return 2 * settings.scaffold + (settings.proximal_mu > 0) + 4 * settings.counts_rounds

    @property
    def _adapted(self) -> list[WeightShape]:
        """The matrices that have adapters."""
        targets = self._lora.target_modules
        if isinstance(targets, str):
            return list(self._shapes.linear)
        matrices = [weight for weight in self._shapes.weights if len(weight.shape) == 2]
        return [w for w in matrices if any(f".{w.module}".endswith(f".{target}") for target in targets)]

    @property
    def _trained_in_place(self) -> int:
        """The size of the base's own parameters that are trained."""
        if self._has_adapters:
            return 0
        is_whole = self._recipe.tuning_part.result == "model"
        return sum(weight.size for weight in self._shapes.weights if is_whole or self._is_left_to_train(weight))

    def _is_left_to_train(self, weight: WeightShape) -> bool:
        """Whether freeze tuning trains this weight."""
        freeze = self._recipe.tuning.settings(FREEZE)
        if weight.layer is None:
            return any(weight.is_in(name) for name in freeze.extra_modules)
        count, modules = freeze.trainable_layers, freeze.trainable_modules
        is_chosen = weight.layer >= self._shapes.layers - count if count >= 0 else weight.layer < -count
        return is_chosen and (isinstance(modules, str) or any(weight.is_in(name) for name in modules))
