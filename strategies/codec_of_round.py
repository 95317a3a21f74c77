"""The codec that a recipe asks for in a round. Whoever writes an update and whoever reads it make the same one here."""

from __future__ import annotations

import numpy as np

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.privacy.mechanism import SiteMechanism
from core_training.recipe.schema import Recipe
from strategies import figures
from strategies.adapter_sharing import travels
from strategies.codec import StateCodec
from strategies.group_gate import figures_of_a_ballot
from strategies.private_ring import PrivateRingCodec
from strategies.ring import RingCodec
from strategies.ring_scale import Scale, largest_change, most_weight_cap
from strategies.selection import Selection, selection_of

NO_VALUES = TrainableState(Manifest.of({}), np.zeros(0, dtype=np.float32))
"""The state of a ballot."""


def state_codec(recipe: Recipe, manifest: Manifest, round_number: int) -> StateCodec:
    """The codec of a round in which each update is read by itself."""
    codec: StateCodec = recipe.privacy.codec_part.make(
        recipe.privacy, manifest, _selection(recipe, manifest, round_number)
    )
    return codec


def ring_codec(recipe: Recipe, manifest: Manifest, round_number: int, scale: Scale, sites: int) -> RingCodec:
    """The ring of a round in which up to `sites` updates are added up.

    Raises ProtocolError when the scale does not fit the manifest or is of greater weights than a site can have, and
    InputError when the ring has no room for so many.
    """
    bits = recipe.privacy.ring_bits
    assert bits is not None, "the recipe's codec is a ring"
    if scale.weight_cap > (most := most_weight_cap(recipe)):
        # On a scale so coarse that changes are far below a step, a 1 in the sum is of one site alone.
        raise ProtocolError(f"weight_cap {scale.weight_cap}: no site has so much in a round; {most} is enough")
    selection = _selection(recipe, manifest, round_number)
    if (mechanism := SiteMechanism.of(recipe)) is not None:
        return PrivateRingCodec(manifest, bits, sites, mechanism, scale, selection=selection, figures=figures.COUNT)
    return RingCodec(manifest, bits, sites, largest_change(recipe), scale, selection=selection, figures=figures.COUNT)


def vote_codec(recipe: Recipe, candidates: int, sites: int) -> RingCodec:
    """The ring in which ballots on so many states are added up: it carries no values, each ballot with weight 1."""
    return sums_codec(recipe, figures_of_a_ballot(candidates), sites)


def sums_codec(recipe: Recipe, numbers: int, sites: int) -> RingCodec:
    """The ring in which so many whole numbers of each site are added up: it carries no values, as `vote_codec`."""
    bits = recipe.privacy.ring_bits
    assert bits is not None, "the recipe's codec is a ring"
    scale = Scale(exponents=[], weight_cap=1)
    return RingCodec(NO_VALUES.manifest, bits, sites, 1.0, scale, figures=numbers)


def _selection(recipe: Recipe, manifest: Manifest, round_number: int) -> Selection | None:
    """The part of a change that travels in this round; None for all."""
    chosen = travels(recipe, manifest, round_number)
    return selection_of(manifest, recipe.privacy.keep, recipe.training.seed, round_number, chosen)
