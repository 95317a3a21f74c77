"""The ring codec that hides a whole site in the sum: each update is clipped, and has its share of the noise.

The distributed discrete Gaussian mechanism (Kairouz, Liu and Steinke 2021): whole numbers before the masks, so that
what is added up in the ring is what was accounted for. One grid for all values, as the clip is of all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.privacy.mechanism import SiteMechanism
from core_training.privacy.noise import SecretRandom
from strategies.draws import key_of
from strategies.ring import RingCodec, RingVector
from strategies.ring_scale import Scale, largest_change_of
from strategies.selection import Selection

_LEAST_CLIP = 1024
"""In steps of the grid: below, rounding is a large part of an update."""
_LEAST_SHARE = 2.0
"""In steps of the grid: sums of discrete Gaussians that are narrower are none (Kairouz et al., theorem 1)."""
_MOST_TRIES = 100


class PrivateRingCodec(RingCodec):
    """A `RingCodec` whose vectors have noise in them, so that the sum of `mechanism.fewest` has all of it.

    Raises InputError where the ring has too few bits for that many sites, ProtocolError for a scale but the one.
    """

    def __init__(
        self,
        manifest: Manifest,
        bits: int,
        sites: int,
        mechanism: SiteMechanism,
        scale: Scale,
        *,
        selection: Selection | None = None,
        figures: int = 0,
    ) -> None:
        if scale.weight_cap != 1 or any(scale.exponents):
            raise ProtocolError("the scale is another than that of a run that hides its sites")
        largest = largest_change_of(mechanism)
        super().__init__(manifest, bits, sites, largest, scale, selection=selection, figures=figures)
        self._step = largest / self._most
        clip = mechanism.terms.clip / self._step
        self._clip = mechanism.terms.clip
        # Stochastic rounding makes a vector longer; one that is longer than this is rounded again.
        self._longest = math.sqrt(clip**2 + self._values / 4) + math.sqrt(clip)
        self._share = mechanism.share * self._longest
        if clip < _LEAST_CLIP or self._share < _LEAST_SHARE:
            raise InputError(
                f"privacy.codec: ring{bits} leaves an update of {sites} sites {clip:.0f} steps, and noise of "
                f"{self._share:.2g}; at least {_LEAST_CLIP} and {_LEAST_SHARE:g} are needed: choose ring24 or ring32"
            )

    def encode(
        self, trained: TrainableState, start: TrainableState, weight: int, figures: Sequence[int], key: bytes
    ) -> RingVector:
        """The vector of one site's update, which weighs 1. `key` (see `draws.noise_key`) decides rounding and noise.

        Raises ProtocolError for what must not enter a sum: NaN, infinite values, and figures that tell something.
        """
        if not self._manifest.digest == trained.manifest.digest == start.manifest.digest:
            raise ProtocolError("the state has another manifest than the run")
        if weight != 1 or any(figures) or len(figures) != self._figures:
            raise ProtocolError("an update that hides its site weighs 1 and tells no figures")
        change = self._change(trained, start)
        norm = math.sqrt(float(change @ change))
        if not math.isfinite(norm):
            raise ProtocolError("the change holds NaN or infinite values")
        change *= min(1.0, self._clip / norm if norm else 1.0) / self._step
        random = SecretRandom(self._key_of_terms(key))
        numbers = self._rounded(change, random) + random.discrete_normal(self._values, self._share)
        vector = np.empty(self.length, dtype=self.dtype)
        # The cast to unsigned turns a negative number into its complement, which is how the ring writes it.
        vector[: self._values] = numbers.astype(np.int32)
        self._write_rest(vector, [0.0] * len(self._limits) + [1], [1, 0, *figures])
        return vector

    def _key_of_terms(self, key: bytes) -> bytes:
        """The key of the noise on these terms: of one update with half the noise, the same noise could be taken off."""
        terms = (self._step, self._share, self._clip, float(self._values))
        return key_of("noise on terms", key.hex(), *(term.hex() for term in terms))

    def _change(self, trained: TrainableState, start: TrainableState) -> npt.NDArray[np.float64]:
        """The change of the values that travel."""
        parts = []
        for piece in self._pieces():
            values = slice(piece.start, piece.stop)
            change = trained.buffer[values].astype(np.float64) - start.buffer[values]
            parts.append(change if self._selection is None else change[self._selection.piece(piece.start, piece.stop)])
        return np.concatenate(parts)

    def _rounded(self, change: npt.NDArray[np.float64], random: SecretRandom) -> npt.NDArray[np.int64]:
        """The change in whole numbers: up with the probability of what rounding down leaves out, and not too long."""
        for _ in range(_MOST_TRIES):
            numbers = np.floor(change + 1 - random.uniform(len(change))).astype(np.int64)
            if float(numbers @ numbers) <= self._longest**2:
                return numbers
        whole: npt.NDArray[np.int64] = np.trunc(change).astype(np.int64)  # towards 0, so no longer than it was
        return whole
