"""What groups of sites bear, and what is said where there are too few sites for them. Numbers and words alone."""

from __future__ import annotations

LEAST_MASKED_GROUP = 3
"""In a sum of two each knows the other's part."""


def bearable(groups: int) -> int:
    """The poisoned sites that so many groups bear, wherever they are drawn: each spoils one group, and its voice."""
    return (groups - 1) // 2


def said_of_too_few(groups: int, least: int, sites: int) -> str:
    """A sentence on a run of so many sites whose rounds are to have so many groups of `least`, and what to do."""
    if least == 1:
        return (
            f"aggregation.rule: group_gate takes {groups} groups here, so {groups} sites at least, and there are "
            f"{sites}; let more sites take part, set aggregation.group_gate.groups lower, or choose rule fedavg"
        )
    return (
        f"aggregation.rule: group_gate takes {groups} groups here, under masks of {least} sites each, as the sum over "
        f"each is opened: {groups * least} sites at least, and there are {sites}; let more sites take part, choose a "
        "ring (privacy.codec) without privacy.secure_aggregation, where a group may be one site, or rule fedavg, which "
        "bears no poisoned site"
    )
