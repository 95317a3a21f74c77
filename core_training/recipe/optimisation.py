"""Optimizers and schedules by their names in `TrainingArguments`, and why some of them cannot be had here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_LAYERWISE = "it projects gradients of weights that it must be told of, and is for runs of mode full; use mode lora"
_AT_ONCE = "it updates within the backward pass, before the gradient of a whole step is known"
_AVERAGED = "it trains other weights than those that are evaluated, saved and exchanged"
_OTHER_DEVICES = "it is for devices that are not supported"

OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw", "grokadamw", "adafactor", "adagrad"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "sgd"),
)
"""The usable ones. A few need a package of their own, which is named where it lacks."""

_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps")
_ARGUMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **{name: _ADEMAMIX for name in OPTIMIZERS if "ademamix" in name},
        "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
        "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
        "adagrad": ("lr_decay", "eps"),
        "rmsprop": ("momentum", "alpha", "eps", "centered"),
        "sgd": ("momentum", "dampening", "nesterov"),
    }
)
"""What transformers reads of `optim_args`, by optimizer."""

ADAMS = frozenset(
    ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
)
"""Those whose steps Adam's bound holds for, whatever the gradient."""

UNUSABLE_OPTIMIZERS = MappingProxyType(
    {
        **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _LAYERWISE),
        **dict.fromkeys((f"{name}_layerwise" for name in ("galore_adamw", "galore_adamw_8bit")), _AT_ONCE),
        **dict.fromkeys(("galore_adafactor_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"), _AT_ONCE),
        **dict.fromkeys((f"schedule_free_{name}" for name in ("adamw", "radam", "sgd")), _AVERAGED),
        **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), _OTHER_DEVICES),
        "adamw_anyprecision": "its package, torchdistX, is no longer kept",
    }
)
"""The others, and why."""

NO_SHARE = "a whole number of steps, as a share of all steps would move when a run is made longer"
"""What is said of a number of steps below 1, where transformers would take a share."""

OWN_SCHEDULES = ("constant_then_linear",)
"""Those that `TrainingArguments` has not."""

SCHEDULES = (
    *OWN_SCHEDULES,
    *("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"),
    *("cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
)

UNUSABLE_SCHEDULES = MappingProxyType(
    {
        "greedy": "it follows a loss that differs from site to site",
        "reduce_lr_on_plateau": "it waits for evaluations, so a step's rate is known neither beforehand nor elsewhere",
    }
)

NEEDED_SETTINGS = MappingProxyType(
    {
        "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
        "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
        "warmup_stable_decay": ("num_decay_steps",),
    }
)
"""Settings of a schedule of which one must be given."""


def wrong_argument(optimizer: str, arguments: str) -> str | None:
    """What is wrong with an optimizer's `NAME=VALUE` with commas between, if anything is."""
    if (known := _ARGUMENTS.get(optimizer)) is None:
        return f"optimizer {optimizer} reads none; leave it out"
    for argument in arguments.split(","):
        name, _, value = (part.strip() for part in argument.partition("="))
        if name not in known or not value:
            return f"'{argument.strip()}' is nothing that {optimizer} reads: NAME=VALUE, of {', '.join(known)}"
    return None


def why_not(name: str, usable: tuple[str, ...], unusable: Mapping[str, str]) -> str | None:
    """Why there is nothing of that name here, if so."""
    if name in unusable:
        return f"'{name}' is not supported: {unusable[name]}. Choose {', '.join(usable[:4])} or another"
    return None if name in usable else f"there is no '{name}'; it can be {', '.join(usable)}"
