"""Records of several sources in the shares that a recipe says, none of them twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError


def mixed(sources: Sequence[str], shares: Mapping[str, float], seed: int) -> npt.NDArray[np.int64]:
    """The numbers of the examples that are kept, in order, so that each source has its share of them.

    `sources` is each example's. As many are kept as can be without one of them twice; of a source of which not all are
    needed those that the seed draws. Raises InputError where the names of the sources are others than the shares'.
    """
    own_source = np.array(sources, dtype=object)
    names, counts = np.unique(own_source, return_counts=True)
    if set(names) != set(shares):
        raise InputError(
            f"data.mix: it has shares for {', '.join(sorted(shares))}, and the records are of {', '.join(names)} (the "
            "files' names without endings); give each a share"
        )
    most = min(count / shares[name] for name, count in zip(names, counts, strict=True))
    random = np.random.default_rng(seed)
    kept = []
    for name, count in zip(names, counts, strict=True):
        own = np.flatnonzero(own_source == name)
        wanted = max(1, min(int(count), round(most * shares[name])))
        kept.append(np.sort(random.permutation(own)[:wanted]))
    return np.sort(np.concatenate(kept))
