"""LoRA: two low-rank factors beside each chosen linear layer are trained; the base stays as it is (Hu et al. 2021).

PiSSA and OLoRA take the factors' start out of the base's own weights, so the base of such a run is the model's less
that start. Both come from an SVD or QR in float32: the same bits for the same weights on the same kind of machine and
libraries. Elsewhere the last bits may differ, and with them the initial digest, by which a site is then refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.lora import LORA, Lora
from core_training.tuning.added_rows import rows_beside_adapters
from core_training.tuning.base import TuningMode
from core_training.tuning.reach import Reach, adapted_weights, reach_of, tell_reach
from core_training.tuning.targets import Targets, experts, leaves, modules_named, targets_of
from core_training.tuning.text_part import freeze_other_senses

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class LoraTuning(TuningMode):
    """Adapters; a `score` head is trained whole."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with adapters. Raises InputError when a chosen module is not there."""
        tuned, reach = self.adapted(model)
        tell_reach(reach)
        return tuned

    def adapted(self, model: PreTrainedModel) -> tuple[PreTrainedModel, Reach]:
        """The model with adapters, and what they reach of it. Raises InputError as `apply`."""
        return _with_adapters(
            model,
            self.recipe.tuning.settings(LORA),
            task_type="SEQ_CLS" if self.recipe.stage_part.head == "score" else "CAUSAL_LM",
        )

    def reach(self, model: PreTrainedModel) -> list[Reach]:
        return [self.adapted(model)[1]]

    @property
    def changes_frozen(self) -> bool:
        return self.recipe.tuning.settings(LORA).carves


def _with_adapters(model: PreTrainedModel, settings: Lora, task_type: str) -> tuple[PreTrainedModel, Reach]:
    from peft import LoraConfig, get_peft_model

    whole = modules_named(model, "tuning.lora.modules_to_save", settings.modules_to_save)
    targets = targets_of(model, settings).outside(whole)
    tied = _tied(model)
    _check_tied(settings, tied.intersection(targets.modules), tied.intersection(whole))
    hint = _hint(model, settings, targets)
    start, is_bare = settings.init_lora_weights, model.device.type == "meta"  # there is nothing to take a start out of
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if is_bare or start == "default" else start,
        # Whole names, as PEFT would also take `input_layernorm` for `norm`.
        modules_to_save=whole or None,
        trainable_token_indices=rows_beside_adapters(model, targets.modules, whole) or None,
        # What the model shares (embeddings and output layer) goes on being shared when it is trained whole. An adapter
        # is its layer's own: those that PEFT shares are parameters by themselves in one memory, which a move parts.
        ensure_weight_tying=bool(tied.intersection(whole)),
        task_type=task_type,
    )
    try:
        tuned = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        # PEFT wraps no container, and adapts nothing inside a module that is trained whole.
        to_blame = isinstance(error, TypeError) or "No modules were targeted" in str(error)
        key = "modules_to_save" if whole and to_blame else "target_modules"
        reason = str(error).splitlines()[0]
        raise InputError(
            f"tuning.lora.{key}: {getattr(settings, key)} does not fit this model ({reason}); it has {leaves(model)}"
        ) from None
    _check_adapters(tuned, settings)
    freeze_other_senses(tuned)  # a module that is trained whole may hold some
    reach = reach_of("tuning.lora: adapters reach", tuned, model, adapted_weights(tuned), hint)
    return cast("PreTrainedModel", tuned), reach  # it hands on to the model inside what it has not itself


def _hint(model: PreTrainedModel, settings: Lora, targets: Targets) -> str:
    """What to do about experts that get no adapters."""
    if not set(experts(model)).difference(targets.parameters):
        return ""
    if key := settings.bars_parameters:
        return f". Under {key} no adapters stand on experts, nor on layers that are called as their parts"
    return ". tuning.lora.experts: true puts adapters on the experts"


def _check_adapters(tuned: nn.Module, settings: Lora) -> None:
    """Raise InputError for adapters that PEFT makes and that do not work."""
    from peft.tuners.lora import LoraLayer
    from torch.nn import Embedding
    from transformers.pytorch_utils import Conv1D

    for name, module in tuned.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        name = name.removeprefix("base_model.model.")
        if settings.use_dora and isinstance(layer, Embedding):
            raise InputError(
                f"tuning.lora.use_dora: it divides by the length of each of a layer's rows, and of {name}, an "
                "embedding, the padding token's is 0; leave it out of target_modules"
            )
        if settings.init_lora_weights == "olora" and isinstance(layer, Conv1D):
            raise InputError(
                f"tuning.lora.init_lora_weights: PEFT's olora does not fit {name}, a Conv1D, whose weights lie the "
                "other way round; use pissa"
            )
    for name, parameter in tuned.named_parameters():
        if "lora_A" in name and parameter.shape[0] < settings.r:
            raise InputError(f"tuning.lora.r: {settings.r} is more than the {parameter.shape[0]} that {name} can have")


def _tied(model: PreTrainedModel) -> set[str]:
    """The names of embeddings and output layer, where they are one matrix."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return set()
    return {name for name, module in model.named_modules() if module is head or module is embeddings}


def _check_tied(settings: Lora, adapted: set[str], whole: set[str]) -> None:
    """Raise InputError for adapters on a shared matrix that something else changes, too."""
    if adapted and settings.carves:
        raise InputError(
            f"tuning.lora.init_lora_weights: {settings.init_lora_weights} takes its start out of {min(adapted)}, which "
            "is embeddings and output layer at once; leave both out of target_modules"
        )
    if adapted and whole:
        raise InputError(
            f"tuning.lora.target_modules: {min(adapted)} is embeddings and output layer at once, and modules_to_save "
            f"trains it whole as {min(whole)}; leave it out of one of them"
        )
