"""Which factors of an adapter B·A are trained and which travel, round by round: the ways that recipes can name."""

from __future__ import annotations

from dataclasses import dataclass
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

ADAPTER_SHARING: Registry[AdapterSharingPart[Any]] = Registry(
    AdapterSharingPart, "fedloom.adapter_sharing", [BOTH, FFA, ROLORA, FEDSA]
)
