"""LoRA: two low-rank factors beside each chosen linear layer are trained; the base stays as it is (Hu et al. 2021).

PiSSA and OLoRA take the factors' start out of the base's own weights, so the base of such a run is the model's less
that start. Both come from an SVD or QR in float32: the same bits for the same weights on the same kind of machine and
libraries. Elsewhere the last bits may differ, and with them the initial digest, by which a site is then refused.
"""

from __future__ import annotations

from typing import Any

from core_training.errors import InputError
from core_training.recipe import Lora, Recipe
from core_training.stages import STAGES

CARVED = ("pissa", "olora")
"""The initialisations that change the base."""


def apply(model: Any, recipe: Recipe) -> Any:
    """The model with adapters; a `score` head is trained whole. Raises InputError when a chosen module is not there."""
    from peft import LoraConfig, get_peft_model

    settings = recipe.tuning.lora
    targets = settings.target_modules
    if isinstance(targets, list):
        _named(model, "target_modules", targets)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init_lora_weights == "default" else settings.init_lora_weights,
        # Whole names, as PEFT would also take `input_layernorm` for `norm`.
        modules_to_save=_named(model, "modules_to_save", settings.modules_to_save) or None,
        # What the model shares (embeddings and output layer) goes on being shared when it is trained.
        ensure_weight_tying=_ties(model, settings),
        task_type="SEQ_CLS" if STAGES[recipe.stage].head == "score" else "CAUSAL_LM",
    )
    try:
        tuned = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"tuning.lora.target_modules: {targets} does not fit this model ({error}); it has {_leaves(model)}"
        ) from None
    for name, parameter in tuned.named_parameters():
        if "lora_A" in name and parameter.shape[0] < settings.r:
            raise InputError(f"tuning.lora.r: {settings.r} is more than the {parameter.shape[0]} that {name} can have")
    return tuned


def _named(model: Any, key: str, names: list[str]) -> list[str]:
    """The whole names of the modules with these names, or with one as the last parts of their own."""
    known = [name for name, _ in model.named_modules()]
    found = {one: [name for name in known if f".{name}".endswith(f".{one}")] for one in names}
    for one in names:
        if not found[one]:
            raise InputError(f"tuning.lora.{key}: '{one}' does not fit this model; it has {_leaves(model)}")
    return [name for one in names for name in found[one]]


def _ties(model: Any, settings: Lora) -> bool:
    """Whether the recipe trains a matrix that is both embeddings and output layer."""
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return False
    shared = [name for name, module in model.named_modules() if module is head or module is embeddings]
    targets = settings.target_modules if isinstance(settings.target_modules, list) else []
    return any(f".{name}".endswith(f".{one}") for name in shared for one in [*targets, *settings.modules_to_save])


def _leaves(model: Any) -> str:
    """Names of the modules that hold weights themselves."""
    return ", ".join(sorted({n.split(".")[-1] for n, module in model.named_modules() if module._parameters}))
