"""Weights in four bits, in the place of a layer or of a tensor that is none (Dettmers et al. 2023)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from core_training.parts.tuning_modes.qlora import Qlora


def quantised_layer(linear: nn.Linear | Conv1D, settings: Qlora, dtype: str) -> nn.Module:
    """A layer with the weights of this one in four bits, on the CPU; it takes the memory of a packed copy."""
    weight_data = linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data
    layer: Any = Linear4bit(
        weight_data.shape[1],
        weight_data.shape[0],
        bias=linear.bias is not None,
        compute_dtype=getattr(torch, settings.compute_dtype or dtype),
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        device="meta",
    )
    # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weight at the first forward in evaluation; later forwards
    # in training then have no gradient. Without effect on a GPU.
    layer.support_avx512bf16_for_cpu = False
    weight: Any = Params4bit(
        weight_data,
        requires_grad=False,
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
        module=layer,
    )
    layer.weight = weight.to("cpu")
    layer.bias = linear.bias
    return cast(nn.Module, layer)


def quantise_parameter(module: nn.Module, name: str, settings: Qlora) -> None:
    """Hold a module's own parameter in four bits; its code reads it in full width, once for each forward."""
    packed, state = quantize_4bit(
        getattr(module, name).data.contiguous(),
        compress_statistics=settings.double_quant,
        quant_type=settings.quant_type,
    )
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    parametrize.register_parametrization(module, name, _InFourBits(state), unsafe=True)
    if not isinstance(vars(module).get("forward"), functools.partial):
        module.forward = functools.partial(_reading_once, module.forward)


def adapt_on_four_bits(adapter: ParamWrapper) -> None:
    """Have an adapter of PEFT's take its own part off a parameter again, and not what reads the four bits."""
    adapter.__class__ = _OnFourBits


class _InFourBits(nn.Module):
    """Reads a tensor out of its four bits, for `torch.nn.utils.parametrize`."""

    def __init__(self, state: QuantState) -> None:
        super().__init__()
        self._state = state

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return dequantize_4bit(packed, self._state)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _InFourBits:  # noqa: FBT001
        """Follow the module to its device, as its scales are no buffers."""
        self._state.to(fn(torch.empty(0, device=self._state.absmax.device)).device)
        return self


class _OnFourBits(ParamWrapper):
    """PEFT 0.21 looks for one of its two kinds of parts alone, and leaves the other where something else is, too."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        with super()._activate_lora(active_adapters):
            # PEFT has read the weights without its part by now and, inside another adapter, they were remembered.
            parametrize._cache.pop((id(self.get_base_layer()), self.parameter_name), None)
            yield

    def _remove_parametrizations(self) -> None:
        parts: Any = self.get_base_layer().parametrizations
        del parts[self.parameter_name][-1]


def _reading_once(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    with parametrize.cached():
        return forward(*inputs, **named)
