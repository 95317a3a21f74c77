"""What a training step would take if it were its matrix multiplications alone, and what takes the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

MATMULS = ("aten::mm", "aten::addmm", "aten::bmm")
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "loss": ("softmax", "nll_loss"),
    "gradients added up, optimizer": ("aten::_fused_adamw", "aten::_foreach", "aten::linalg_vector_norm"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::zero_"),
    "element by element": (
        "aten::add",
        "aten::mul",
        "aten::silu",
        "aten::mean",
        "aten::pow",
        "aten::rsqrt",
        "aten::neg",
    ),
}
"""Other operators, by what their names contain."""

Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class StepProfile:
    """Seconds of a step and of its matrix multiplications by themselves, and each kind of operator's share of it."""

    seconds: float
    matmul_seconds: float
    shares: dict[str, float]


def profiled(step: Callable[[], object]) -> StepProfile:
    """Take two steps: one against the clock, one under the profiler. Then the latter's multiplications alone."""
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        step()
    events = [event for event in record.events() or [] if event.self_cpu_time_total > 0]
    whole = sum(event.self_cpu_time_total for event in events)
    shares: dict[str, float] = {}
    for event in events:
        kind = _kind_of(event.name)
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total / whole
    shapes = [event.input_shapes for event in events if event.name in MATMULS]
    return StepProfile(seconds, _seconds_of(shapes), dict(sorted(shares.items(), key=lambda one: -one[1])))


def _kind_of(operator: str) -> str:
    if operator in MATMULS:
        return "matrix multiplications"
    return next((kind for kind, names in KINDS.items() if any(name in operator for name in names)), "everything else")


def _seconds_of(shapes: Sequence[Shapes]) -> float:
    """The time of products of these shapes, one after another; of an addmm, the last two matrices'."""
    pairs = [[torch.randn(*shape) for shape in [one for one in given if len(one) >= 2][-2:]] for given in shapes]
    began = time.perf_counter()
    for left, right in pairs:
        torch.matmul(left, right)
    return time.perf_counter() - began
