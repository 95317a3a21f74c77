"""What follows where nearly all records are one site's, in words."""

from __future__ import annotations

NEARLY_ALL = 0.9
"""Of the sites' records, at one of them."""


def said_of_one_that_holds(site: str, share: float) -> str:
    """A sentence on a site with this share of the records, and what to do."""
    return (
        f"{site} holds {share:.0%} of all records: each round gives every site as many steps, so most of them are seen "
        "seldom; train there first and start the run from that (model.adapters), or divide it into several sites"
    )
