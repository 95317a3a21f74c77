"""What adapters stand on: the linear layers of a model's text part, and the experts that it holds as one tensor."""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.lora import Lora
from core_training.tuning.text_part import is_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEY = "tuning.lora.target_modules"
_READ = re.compile(r"(?<![\"\w.])((?:\w+\.)+)(\w+)\.weight\b(?!\s*\[|\.(?:dtype|device|shape)\b)")
"""A layer's weight in the code around it. Bloom reads a slice of some in a mode that it is not in."""

_ROUTER = re.compile("Router|TopKGating|MoE\\w*Gate$")
"""In the names of classes."""


@dataclass(frozen=True)
class Targets:
    """The places of adapters, by whole names."""

    modules: list[str]
    parameters: list[str]
    """Weights that are adapted by themselves: experts, and layers whose names PEFT takes for an expert's."""

    def outside(self, whole: list[str]) -> Targets:
        """Those outside modules that are trained whole; of modules inside them PEFT itself adapts none."""
        inside = tuple(f"{name}." for name in whole)
        return replace(self, parameters=[name for name in self.parameters if not name.startswith(inside)])


def targets_of(model: PreTrainedModel, settings: Lora) -> Targets:
    """The places that the settings name. Raises InputError for a name that is none, or where no adapter can stand."""
    all_linear = settings.target_modules == "all-linear"
    layers, fused = (linear_layers(model), []) if all_linear else _named(model, list(settings.target_modules))
    if lost := _lost_when_loaded(model, layers):
        if not all_linear:
            raise InputError(f"{_KEY}: PEFT finds no adapter on {lost[0]} again when it loads one; leave this out")
        layers = [name for name in layers if name not in lost]
    if fused and settings.experts is False:
        raise InputError(f"tuning.lora.experts: it is false, and {_KEY} names {fused[0]}; leave one of them out")
    if settings.experts or (all_linear and settings.experts is None):
        fused = experts(model)
    for_experts = _taken_for_experts(model, {_leaf(name) for name in layers})
    weights = sorted(
        {*fused, *(name for name, _ in model.named_parameters() if _is_weight_of(name, layers, for_experts))}
    )
    if weights and (key := settings.bars_parameters):
        if not all_linear:
            raise InputError(f"{key}: PEFT has no such adapter for {weights[0]}; leave out one of them")
        weights = []
    return Targets([name for name in layers if _leaf(name) not in for_experts], weights)


def experts(model: nn.Module) -> list[str]:
    """The names of tensors that hold a matrix for each of a layer's experts."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "Experts" in type(module).__name__ and is_of_text(name)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether the layer is linear, whatever it is called: it gives one tensor of its width.

    GPT-2's Conv1D is one whose weights lie the other way. A router may be linear by inheritance alone, and give scores
    and choices at once.
    """
    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        output = module(torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
    except Exception:  # it wants something else than a tensor of this shape
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def read_elsewhere(model: nn.Module) -> set[str]:
    """The names of modules whose weights other code reads, as the kernels of state-space models.

    An adapter beside such a layer is passed by, and other code reads no packed weights.
    """
    return {
        f"{name}.{inside}" if name else inside
        for name, module in model.named_modules()
        if (read := _reads(cast("Hashable", type(module))))
        for inside, _ in module.named_modules()
        if ("self", inside) in read or ("", _leaf(inside)) in read
    }


def leaves(model: nn.Module) -> str:
    """The names of the text part's modules that hold weights themselves, for a message."""
    holders = {_leaf(name) for name, module in model.named_modules() if module._parameters and is_of_text(name)}
    return ", ".join(sorted(holders))


def modules_named(model: nn.Module, key: str, names: list[str]) -> list[str]:
    """The whole names of the text part's modules with these names, or with one as the last parts of their own.

    Raises InputError for a name that none has.
    """
    places = _text_places(model)
    found = {one: [name for name in places if _ends(name, one)] for one in names}
    for one in names:
        if not found[one]:
            raise _no_place(model, key, one)
    return [name for one in names for name in found[one]]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The linear layers but for the output, and those that no adapter can stand on."""
    apart = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    left_alone = read_elsewhere(model) | inside_routers(model)
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and id(module) not in apart and name not in left_alone and is_of_text(name)
    ]


def inside_routers(model: nn.Module) -> set[str]:
    """The names of modules inside what chooses experts: it stays as it is, whatever it is made of."""
    return {
        f"{name}.{inside}"
        for name, module in model.named_modules()
        if _ROUTER.search(type(module).__name__)
        for inside, _ in module.named_modules()
        if inside
    }


def _text_places(model: nn.Module) -> list[str]:
    """The names of the text part's modules. What sees or hears may have layers of the same names."""
    return [name for name, _ in model.named_modules() if is_of_text(name)]


def _no_place(model: nn.Module, key: str, name: str) -> InputError:
    """The error of a name that no module of the text part has."""
    senses = any(_ends(place, name) for place, _ in model.named_modules())
    why = "names what sees or hears alone, which stays as it is" if senses else "does not fit this model"
    return InputError(f"{key}: '{name}' {why}; it has {leaves(model)}")


def _named(model: PreTrainedModel, names: list[str]) -> tuple[list[str], list[str]]:
    """The modules and the tensors of experts with these names.

    What an expert's part was called before (Mixtral's `w1`) stands for the tensor that holds it now.
    """
    former = _former_names(model)
    parts = {
        tensor: [f"{tensor.rpartition('.')[0]}.{part}" for part in former.get(_leaf(tensor), [])]
        for tensor in experts(model)
    }
    places = _text_places(model)
    for one in names:
        if not any(_ends(name, one) for name in chain(places, parts, *parts.values())):
            raise _no_place(model, _KEY, one)
    modules = [name for name in places if any(_ends(name, one) for one in names)]
    if by_hand := read_elsewhere(model).intersection(modules):
        raise InputError(
            f"{_KEY}: the code of this model reads the weights of {min(by_hand)} itself, past any adapter; leave it out"
        )
    return modules, [tensor for tensor in parts if _asks_for(tensor, parts[tensor], names)]


def _asks_for(tensor: str, parts: list[str], names: list[str]) -> bool:
    """Whether the names ask for a tensor of experts. Raises InputError where they ask for a part of it."""
    if any(_ends(tensor, one) for one in names):
        return True
    missing = [part for part in parts if not any(_ends(part, one) for one in names)]
    if missing and len(missing) < len(parts):
        raise InputError(
            f"{_KEY}: this model holds {' and '.join(map(_leaf, parts))} of its experts as one tensor "
            f"({_leaf(tensor)}); name {' and '.join(map(_leaf, missing))}, too"
        )
    return bool(parts) and not missing


def _former_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """What the parts of tensors of experts were called while each expert was a module, by the tensor's own name."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return {
        _leaf(conversion.target_patterns[0]): [
            _leaf(source.removesuffix(".weight")) for source in conversion.source_patterns
        ]
        for conversion in get_model_conversion_mapping(model)
        if all("experts" in source and "*" in source for source in conversion.source_patterns)
    }


def _taken_for_experts(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those last parts of names that PEFT takes for an expert's, as loading an adapter does: it goes by them alone.

    A dense layer of such a name is adapted by its weight, or its adapter would not be found again.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # it is a part of a tensor, and the other part is not named
            taken.add(name)
        else:
            taken |= {name} - set(config.target_modules or [])
    return taken


def _lost_when_loaded(model: PreTrainedModel, layers: list[str]) -> list[str]:
    """Those layers whose adapters PEFT looks for elsewhere: it takes a name of today for one of an older checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    keys = {name: f"{name}.lora_A.weight" for name in layers}
    # PEFT undoes a renaming that takes no more than a prefix away.
    return [
        name for name, key in keys.items() if any(not key.endswith(one.rename_source_key(key)[0]) for one in renamings)
    ]


def _is_weight_of(parameter: str, layers: list[str], leaves: set[str]) -> bool:
    layer, _, own = parameter.rpartition(".")
    return own == "weight" and _leaf(layer) in leaves and layer in layers


@cache
def _reads(kind: Hashable) -> frozenset[tuple[str, str]]:
    """The layers whose weights the code of a class of modules reads: of its own, and of modules anywhere inside."""
    try:
        found = _READ.findall(inspect.getsource(cast("type[nn.Module]", kind)))
        return frozenset(("self" if holder == "self." else "", layer) for holder, layer in found)
    except (OSError, TypeError):  # there is no source of it
        return frozenset()


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")
