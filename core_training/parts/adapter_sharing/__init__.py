"""Which factors of an adapter B·A are trained and which travel, round by round: the ways that recipes can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from core_training.parts.registry import Part, Registry, S
from core_training.parts.section import Section


@dataclass(frozen=True, kw_only=True)
class AdapterSharingPart(Part[S]):
    """The facts of a way; `target` is its `strategies.adapter_sharing.Turns`."""

    travels: str = "this is what travels, and nothing else"
    """What of an adapter travels, in words."""
    leaves_alone: bool = False
    """Whether a tensor that trains in one round is left alone in another."""
    keeps_own: bool = False
    """Whether a factor never leaves its site, so that the server's result lacks it."""
    remade_by: str | Callable[..., Any] | None = None
    """`module:name` of what makes a round's state of its mean before the commit, or that itself: of the state and the
    adapters' rank. None where the mean is taken as it is."""

    def load_remaker(self) -> Any:
        """Import what `remade_by` names; None where it names nothing."""
        if not isinstance(self.remade_by, str):
            return self.remade_by
        module, _, name = self.remade_by.partition(":")
        return getattr(import_module(module), name)


BOTH = AdapterSharingPart[Section](name="both", target="strategies.adapter_sharing:both")
FFA = AdapterSharingPart[Section](
    name="ffa",
    target="strategies.adapter_sharing:ffa",
    travels="of each adapter B·A only B trains and travels, and A stays as it began",
)
ROLORA = AdapterSharingPart[Section](
    name="rolora",
    target="strategies.adapter_sharing:rolora",
    travels="of each adapter B·A the factors take turns: B trains and travels in one round, A in the next",
    leaves_alone=True,
)
FEDSA = AdapterSharingPart[Section](
    name="fedsa",
    target="strategies.adapter_sharing:fedsa",
    travels="of each adapter B·A only A travels: a site ends with a B of its own, and what is common to all has none: "
    "it answers as the base does",
    keeps_own=True,
)
FEDSVD = AdapterSharingPart[Section](
    name="fedsvd",
    target="strategies.adapter_sharing:fedsvd",
    travels="of each adapter B·A only B trains and travels, and after each round the server makes A anew of the "
    "product's right singular vectors",
    remade_by="strategies.fedsvd:orthonormal",
)

ADAPTER_SHARING: Registry[AdapterSharingPart[Any]] = Registry(
    AdapterSharingPart, "fedloom.adapter_sharing", [BOTH, FFA, ROLORA, FEDSA, FEDSVD]
)
