"""LoRA-XS by PEFT's LoRA: A, a core R and B in a row, of which R alone is trained (Bałazy et al. 2024).

A and B are near the first singular vectors of the layer's own weight, without their sizes: so a step of R is as long
in all directions. They are found in float64 and rounded to eight bits, so that unlike machines come to the same
values unless singular values all but coincide. Where they do not, the initial digest says so, and a site is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.lora_xs import LORA_XS, MOST_R
from core_training.tuning.reach import Reach, adapted_weights, reach_of, tell_reach
from core_training.tuning.small_adapters import SmallAdapters
from core_training.tuning.targets import linear_layers, modules_named

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

_KEY = "tuning.lora_xs"
_ADAPTER = "default"
_PREFIX = "base_model.model."
_ITERATIONS, _MORE = 1, 16
_CORE = "lora_A.core.weight"


class CoredProjection(nn.Module):
    """A and then R: to PEFT one projection, whose weight is R·A."""

    def __init__(self, down: nn.Linear) -> None:
        """`down` is A: it is frozen, and R begins with zeros."""
        super().__init__()
        self.down = down
        self.core = nn.Linear(down.out_features, down.out_features, bias=False).to(down.weight)
        nn.init.zeros_(self.core.weight)
        down.weight.requires_grad_(False)

    @property
    def weight(self) -> torch.Tensor:
        """R·A (rank, inputs), made anew at each look."""
        return self.core.weight @ self.down.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        cored: torch.Tensor = self.core(self.down(values))
        return cored


class LoraXsTuning(SmallAdapters):
    """A core for each chosen linear layer; a `score` head is trained whole."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with cores. Raises InputError for what is no linear layer or has too few components."""
        tuned = self._with_cores(model)
        tell_reach(_of(tuned, model))
        return tuned

    def reach(self, model: PreTrainedModel) -> list[Reach]:
        return [_of(self._with_cores(model), model)]

    def is_as_in_files(self, name: str) -> bool:
        return ".lora_" not in name

    def folded(self, model: nn.Module, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """A (r, inputs) as it is, and B·R (outputs, r) as PEFT's B."""
        plain = {name: values for name, values in tensors.items() if not name.endswith(f".{_CORE}")}
        for name, layer in _adapted_layers(model):
            projection, up = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER].weight
            product = up.detach().double() @ projection.core.weight.detach().double()
            plain[f"{name}.lora_A.weight"] = projection.down.weight.detach().float().cpu().numpy()
            plain[f"{name}.lora_B.weight"] = product.float().cpu().numpy()
        return plain

    def _with_cores(self, model: PreTrainedModel) -> PreTrainedModel:
        from peft import LoraConfig

        settings = self.recipe.tuning.settings(LORA_XS)
        names, key = settings.target_modules, f"{_KEY}.target_modules"
        targets = linear_layers(model) if names == "all-linear" else modules_named(model, key, list(names))
        rank = _rank(settings.r, {name: model.get_submodule(name) for name in targets})
        config = LoraConfig(
            r=rank,
            lora_alpha=settings.lora_alpha or rank,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            task_type=self._task,
        )
        is_bare = model.device.type == "meta"  # there are no values to take factors of
        tuned = self._adapted(model, config)
        for _, layer in _adapted_layers(tuned):
            if not is_bare:
                _fix_factors(layer, rank)
            layer.lora_B[_ADAPTER].weight.requires_grad_(False)
            layer.lora_A[_ADAPTER] = CoredProjection(layer.lora_A[_ADAPTER])
        return tuned


def _adapted_layers(tuned: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers with their canonical names."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(tuned.named_modules()):
        if isinstance(module, LoraLayer):
            yield name.removeprefix(_PREFIX), module


def _rank(wanted: int | None, layers: Mapping[str, nn.Module]) -> int:
    """The rank of all layers. Raises InputError where one cannot have so many components, or is no linear layer."""
    rank = wanted or MOST_R
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Embedding) or weight is None or weight.dim() != 2:
            raise InputError(f"{_KEY}.target_modules: {name} is no linear layer; leave it out")
        if wanted is not None and min(weight.shape) < wanted:
            raise InputError(f"{_KEY}.r: {wanted} is more than the {min(weight.shape)} components of {name}; lower it")
        rank = min(rank, *weight.shape)
    return rank


def _fix_factors(layer: Any, rank: int) -> None:
    weight = layer.get_base_layer().weight
    with torch.no_grad():
        a, b = first_vectors(weight.T if layer.fan_in_fan_out else weight, rank)
        layer.lora_A[_ADAPTER].weight.copy_(a)
        layer.lora_B[_ADAPTER].weight.copy_(b)


def first_vectors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, inputs) and B (outputs, rank) of a weight (outputs, inputs): its first right and left singular vectors.

    By subspace iteration (Halko et al. 2011, algorithm 4.4) with some more vectors, which takes seconds where an SVD
    takes minutes: near them, and exact where that is all of the weight. (Runs learnt no less from it than from an SVD.)
    The largest value of each row of A is positive; bfloat16.
    """
    values = weight.detach().double()
    width = min(rank + _MORE, *values.shape)
    # Uniform values are the same bits on all machines, normal ones are not.
    start = torch.rand(values.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    basis = torch.linalg.qr(values @ start.to(values.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(values @ torch.linalg.qr(values.T @ basis).Q).Q
    left, _, right = torch.linalg.svd(basis.T @ values, full_matrices=False)
    a, b = right[:rank], basis @ left[:, :rank]
    signs = torch.sign(a.gather(1, a.abs().argmax(dim=1, keepdim=True)))
    return (signs * a).bfloat16(), (b * signs.T).bfloat16()


def _of(tuned: PreTrainedModel, model: PreTrainedModel) -> Reach:
    return reach_of(f"{_KEY}: adapters reach", tuned, model, adapted_weights(tuned))
