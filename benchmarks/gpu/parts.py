"""The parts of the measurement, in the order of what must not be missed, each with the time that it may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Part:
    """A function of a module that is called in a process of its own."""

    name: str
    function: str
    """`module:name`, which is imported there alone: a library that is missing is that part's failure."""
    arguments: dict[str, Any] = field(default_factory=dict)
    least: float = 20.0
    """Seconds that it takes at the least: with fewer left it is not begun."""
    limit: float = 90.0
    """Seconds after which it is ended."""
    needs: str | None = None
    """The part without whose success it cannot be."""
    not_measured: str | None = None
    """Why it cannot be on this machine, if so."""


def plan(machine: dict[str, Any], folder: str, *, tiny: bool) -> list[Part]:
    """The parts for a machine, as `device.describe` has it; each once, though one shape may serve for several."""
    cells, small, large = ("tiny", "tiny", "tiny") if tiny else ("small", "1b", "7b")
    parts = _Parts(machine, folder).in_order(cells, small, large)
    return list({part.name: part for part in parts}.values())


_LARGE = "7b"
_LEAST_OF_LARGE = 45.0
_LIMIT_OF_LARGE = 150.0
"""Reading, hashing and quantising some 14 GB takes longer than training on them."""


@dataclass(frozen=True)
class _Parts:
    """The parts on a machine, with all that is made in `folder`."""

    machine: dict[str, Any]
    folder: str

    def in_order(self, cells: str, small: str, large: str) -> Iterator[Part]:
        """All parts, given the shapes of the matrix and of two sizes of model."""
        yield self.model(cells)
        yield self.matrix(cells)
        yield self.model(small)
        for stage in ("sft", "dpo", "grpo"):
            yield self.ours(small, stage, "lora")
            yield self.trl(small, stage, "defaults")
        for attention in ("flex_attention", "flash_attention_2", "flash_attention_3", "sdpa"):
            yield self.packing(small, attention)
        yield self.model(large)
        for stage in ("sft", "dpo"):
            yield self.ours(large, stage, "lora")
            yield self.trl(large, stage, "defaults")
        yield self.ours(large, "sft", "qlora")
        for stage in ("sft", "dpo"):
            yield self.ours_with_liger(small, stage)
            yield self.trl(small, stage, "liger")
            yield self.trl(small, stage, "bf16 model")
        yield self.ours(small, "sft", "full")
        for stage in ("sft", "dpo"):
            yield self.trl(large, stage, "liger")

    def model(self, shape: str) -> Part:
        """The making of a shape's model, which the others need."""
        made = self._on(f"model {shape}", "shapes:make_model", shape)
        return replace(made, needs=None)

    def matrix(self, shape: str) -> Part:
        """Every stage × tuning mode."""
        return replace(self._on("matrix", "matrix:measure", shape, seconds=120.0), limit=150.0)

    def ours(self, shape: str, stage: str, tuning: str) -> Part:
        """Our engine's figures."""
        return self._on(f"{shape} {stage} {tuning}", "throughput:measure", shape, stage=stage, tuning=tuning)

    def ours_with_liger(self, shape: str, stage: str) -> Part:
        """Our engine's figures with Liger's kernels."""
        made = self._on(
            f"{shape} {stage} lora liger", "throughput:measure", shape, stage=stage, tuning="lora", liger=True
        )
        return replace(made, not_measured=self.machine["liger"])

    def trl(self, shape: str, stage: str, setting: str) -> Part:
        """TRL's figures."""
        made = self._on(f"{shape} {stage} TRL {setting}", "against_trl:measure", shape, stage=stage, setting=setting)
        return replace(made, not_measured=self.machine["liger"]) if setting == "liger" else made

    def packing(self, shape: str, attention: str) -> Part:
        """Packed and padded rows under an implementation of attention."""
        made = self._on(f"{shape} packing {attention}", "packing:measure", shape, attention=attention)
        return replace(made, not_measured=self.machine["attention"][attention])

    def _on(self, name: str, function: str, shape: str, **arguments: Any) -> Part:
        """A part on a shape's model, with the time that this takes."""
        part = Part(
            name,
            f"benchmarks.gpu.{function}",
            {"shape": shape, "folder": self.folder, **arguments},
            needs=f"model {shape}",
        )
        return replace(part, least=_LEAST_OF_LARGE, limit=_LIMIT_OF_LARGE) if shape == _LARGE else part
