"""bitsandbytes quantises where and when we ask for it, and leaves its layers trainable through an evaluation."""

from __future__ import annotations

import sys
from typing import Any

import core_training.foundation.environment  # noqa: F401  # isort: skip - before PyTorch is imported
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
from torch import nn

from tests.contracts.leaning import leans, look_up, names

NAMES = {"core_training/tuning/qlora.py": ["bitsandbytes.nn:Linear4bit", "bitsandbytes.nn:Params4bit"]}


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


def plain(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 32, bias=bias)


def quantised(linear: nn.Linear, double_quant: bool = True, compute: torch.dtype = torch.float32) -> Any:
    """The layer in four bits, as core_training/tuning/qlora.py makes it."""
    layer: Any = Linear4bit(  # type: ignore[no-untyped-call]
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    layer.support_avx512bf16_for_cpu = False
    layer.weight = Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=layer
    ).to("cpu")
    layer.bias = linear.bias
    return layer


@leans("core_training/tuning/qlora.py", "core_training/models/base_model.py")
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_is_quantised_on_its_way_to_the_cpu_and_the_layer_knows_how(double_quant: bool) -> None:
    linear = plain()
    before = linear.weight.detach().clone()
    layer = quantised(linear, double_quant)
    assert type(layer.weight) is Params4bit
    assert (layer.weight.dtype, layer.weight.numel()) == (torch.uint8, 64 * 32 // 2)
    assert layer.quant_state is layer.weight.quant_state
    assert layer.quant_state.nested is double_quant
    assert not layer.weight.requires_grad
    assert torch.equal(linear.weight, before), "the weight that it was made from is changed"
    assert torch.equal(quantised(plain(), double_quant).weight, layer.weight), "two sites would hold other bytes"
    assert layer.weight.detach().contiguous().view(torch.uint8).numpy().nbytes == 64 * 32 // 2


@leans("core_training/tuning/qlora.py")
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_what_its_four_bits_stand_for(double_quant: bool, compute: torch.dtype) -> None:
    linear = plain().to(compute)
    layer = quantised(linear, double_quant, compute)
    weight = dequantize_4bit(layer.weight.data, layer.quant_state).float()
    assert (weight - linear.weight.float()).abs().max() < 0.03
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(compute).requires_grad_()
    output = layer(x)
    assert output.dtype == compute
    tolerance = {} if compute is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(output.float(), x.float() @ weight.T + linear.bias.float(), **tolerance)
    output.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), weight.sum(dim=0).expand(5, 64), **tolerance)


@leans("core_training/tuning/qlora.py")
@pytest.mark.parametrize("kept", [True, False])
def test_an_evaluation_repacks_a_weight_only_where_the_layer_says_that_it_may(
    monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """A repacked weight has no gradient for what lies before it."""
    repacked: list[None] = []

    def repack(weight: Any, state: Any) -> Any:
        repacked.append(None)
        return weight, state

    monkeypatch.setattr(sys.modules[Linear4bit.__module__], "_convert_weight_packed_for_cpu", repack)
    layer = quantised(plain())
    assert "support_avx512bf16_for_cpu" in vars(Linear4bit(2, 2, device="meta"))  # type: ignore[no-untyped-call]
    if not kept:
        layer.support_avx512bf16_for_cpu = True
    layer.eval()
    layer(torch.ones(1, 64))
    assert len(repacked) == (0 if kept else 1)


@leans("core_training/tuning/qlora.py")
def test_a_layer_has_gradients_after_an_evaluation() -> None:
    layer = quantised(plain())
    before = layer.weight.detach().clone()
    layer.eval()
    with torch.no_grad():
        evaluated = layer(torch.ones(1, 64))
    assert torch.equal(layer.weight, before)
    layer.train()
    x = torch.ones(1, 64, requires_grad=True)
    trained = layer(x)
    torch.testing.assert_close(trained, evaluated)
    trained.sum().backward()
    assert x.grad is not None
    assert x.grad.any()
