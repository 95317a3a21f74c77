"""The facts of a tuning mode, known without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from core_training.parts.registry import Part, S


@dataclass(frozen=True, kw_only=True)
class TuningPart(Part[S]):
    """The facts of a tuning mode; `target` is its `core_training.tuning.base.TuningMode`."""

    trains: Callable[[Any], str]
    """The trained part, in words; takes the whole section `tuning`."""
    result: Literal["adapter", "layers", "model"]
    """The form of a run's result: factors beside the base, some of the model's weights, or all of them."""
    uses: tuple[str, ...] = ()
    """Other modes whose settings it follows, too."""
    is_folded: bool = False
    """Whether its adapter is one of PEFT's once what is trained is put together with frozen factors, as `fedloom
    export` does; until then the adapter's configuration names the mode as its type."""
    unquantised: str | None = None
    """The mode that trains the same tensors beside whole weights, where this one holds the base in fewer bits."""

    @property
    def has_factors(self) -> bool:
        """Whether it trains the factors of LoRA."""
        return "lora" in self.sections

    @property
    def sections(self) -> tuple[str, ...]:
        """The sections that the mode follows."""
        return (*self.uses, *((self.name,) if self.settings is not None else ()))
