"""The terms of a run's secure aggregation, and what a site demands of them before it takes part."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass

from core_training.foundation.errors import InputError, ProtocolError
from core_training.recipe.schema import Recipe
from security.signing import canonical_json


@dataclass(frozen=True)
class Terms:
    """The terms that the recipe fixes, alike for all sites of a run.

    `threshold`: the holders of shares that it takes to open a sum: a number, or more than this share of them, or (None)
    more than two thirds and so many that the server needs `minimum_sites` − 1 in league. `minimum_sites`: the fewest
    updates whose sum is opened. `ring_bits`: 16, 24 or 32. `clip`: the most that one value may change in a round.
    """

    threshold: int | float | None
    minimum_sites: int
    ring_bits: int
    clip: float

    def threshold_of(self, holders: int) -> int:
        """The number of a site's `holders` of shares that open what it dealt.

        Always more than half, or two halves could open two different sums. Raises ProtocolError when they are too few.
        """
        if isinstance(self.threshold, int):
            threshold = self.threshold
        elif self.threshold is None:
            # Half of both, rounded up: 2·threshold − holders is then minimum_sites − 1 or more.
            threshold = min(max(2 * holders // 3 + 1, (holders + self.minimum_sites) // 2), holders)
        else:
            threshold = math.floor(self.threshold * holders) + 1
        if not holders < 2 * threshold <= 2 * holders:
            raise ProtocolError(
                f"threshold {threshold} among {holders} sites: it must be more than half of them and no more than all"
            )
        return threshold

    def league_of(self, holders: int) -> int:
        """The fewest of a site's `holders` that, in league with the server, read its update out of one sum.

        All others of the smallest sum; or as many as answer twice, for two lists of survivors, until each list has
        `threshold` answers. Raises ProtocolError: see `threshold_of`.
        """
        threshold = self.threshold_of(holders)
        return min(2 * threshold - holders, max(threshold, self.minimum_sites) - 1)

    def digest(self) -> bytes:
        """32 bytes that differ for different terms."""
        return hashlib.sha256(canonical_json(asdict(self))).digest()


@dataclass(frozen=True)
class Minimums:
    """A site's demands in its own `site.yaml`; it refuses a run that offers less.

    `threshold` is a share of the holders, to be exceeded. `minimum_sites` is the fewest updates in a sum, and holds
    against two lists of survivors, too: no fewer than `minimum_sites` − 1 in league with the server read this site's
    update.
    """

    threshold: float = 0.5
    minimum_sites: int = 3
    ring_bits: int = 16
    least_clip: float | None = None
    most_clip: float | None = None

    def check(self, terms: Terms) -> None:
        """Raise InputError when the terms fall below; a threshold in sites is checked when the cohort is known."""
        share = 2 / 3 if terms.threshold is None else terms.threshold
        if isinstance(share, float) and share < self.threshold:
            raise InputError(f"threshold {share:.3g}: this site takes part from {self.threshold:.3g} up")
        if terms.minimum_sites < self.minimum_sites:
            raise InputError(f"minimum_sites {terms.minimum_sites}: this site takes part from {self.minimum_sites} up")
        if terms.ring_bits < self.ring_bits:
            raise InputError(f"ring_bits {terms.ring_bits}: this site takes part from {self.ring_bits} up")
        if self.least_clip is not None and terms.clip < self.least_clip:
            raise InputError(f"clip {terms.clip:g}: this site takes part from {self.least_clip:g} up")
        if self.most_clip is not None and terms.clip > self.most_clip:
            raise InputError(f"clip {terms.clip:g}: this site takes part up to {self.most_clip:g}")

    def check_threshold(self, terms: Terms, holders: int) -> int:
        """The threshold among `holders`.

        Raises ProtocolError when it is no larger a share than this site demands, and when fewer sites in league with
        the server than this site's `minimum_sites` − 1 would be enough.
        """
        threshold = terms.threshold_of(holders)
        if threshold <= self.threshold * holders:
            raise ProtocolError(
                f"threshold {threshold} of {holders} sites: this site wants more than {self.threshold:.3g} of them"
            )
        if (league := terms.league_of(holders)) < self.minimum_sites - 1:
            raise ProtocolError(
                f"threshold {threshold} of {holders} sites: the server would need {league} in league to read another's "
                f"update; this site wants {self.minimum_sites - 1} (its minimum_sites less one), so a threshold of "
                f"{(holders + self.minimum_sites) // 2}: leave out privacy.secure_aggregation.threshold, or raise it"
            )
        return threshold


def terms_of(recipe: Recipe, clip: float) -> Terms:
    """The terms that a recipe with `privacy.secure_aggregation` fixes; `clip` is the one that its codec cuts at."""
    secure, ring_bits = recipe.privacy.secure, recipe.privacy.ring_bits
    assert secure is not None, "there are terms where there is secure aggregation"
    assert ring_bits is not None, "secure aggregation has a ring"
    fewest = recipe.least_group if recipe.tries_groups else secure.minimum_sites
    return Terms(secure.threshold, fewest, ring_bits, clip)
