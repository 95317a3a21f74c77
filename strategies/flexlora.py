"""FlexLoRA (Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources"): of each adapter the best rank-r approximation of ΣpᵢBᵢAᵢ, where averaging takes ΣpᵢBᵢ·ΣpᵢAᵢ.

A product does not say which factors it is of. The pair is taken whose A is nearest to the mean of the sites' A: the
mean's rows, projected onto those that the product has. So what optimizers remember of a factor still fits it, and sites
that agree get back what they sent. All else that is trained is averaged. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError
from core_training.foundation.state import Float32Array, Manifest, TrainableState
from strategies.robust_rules.kept_updates import KeptUpdates, combination

_FIRST = re.compile(r"\.lora_(embedding_)?A(?=\.|$)")
_MOST_STRETCH = 1e4
"""Of the projection: beyond it the mean lacks a direction that the product has, and A is taken from the product."""
_NOTHING = 1e-12
"""A component of the product so small beside the largest is rounding."""

Matrix = npt.NDArray[np.float64]


class FlexLora(KeptUpdates):
    """One round's aggregation; takes the memory of one state for each site."""

    def __init__(self, manifest: Manifest, rank: int) -> None:
        """Raises InputError for adapters whose components are not all of one product."""
        super().__init__(manifest)
        self._pairs = pairs(manifest, rank, "aggregation.rule: 'flexlora'")

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        shares = np.array(weights) / np.sum(weights)
        result = combination(states, shares)
        if len(states) == 1:
            return result
        tensors = dict(result.tensors())
        of_sites = [dict(state.tensors()) for state in states]
        for first, second in self._pairs:
            a_factors, b_factors = ([flat(tensors[name]) for tensors in of_sites] for name in (first, second))
            a, b = mean_product(a_factors, b_factors, shares)
            tensors[first][...] = a.reshape(tensors[first].shape)
            tensors[second][...] = b.reshape(tensors[second].shape)
        return result


def mean_product(a_factors: Sequence[Matrix], b_factors: Sequence[Matrix], shares: Matrix) -> tuple[Matrix, Matrix]:
    """A (r, k) and B (d, r) of the best rank-r approximation of ΣpᵢBᵢAᵢ in the Frobenius norm.

    The sum is of rank n·r at most: it is never written out, only its factors' triangles are decomposed.
    """
    rank = len(a_factors[0])
    left, right = np.hstack([p * b for p, b in zip(shares, b_factors, strict=True)]), np.vstack(a_factors)
    left_basis, left_triangle = np.linalg.qr(left)
    right_basis, right_triangle = np.linalg.qr(right.T)
    u, sizes, v = np.linalg.svd(left_triangle @ right_triangle.T)
    kept = min(rank, int(np.count_nonzero(sizes > _NOTHING * sizes[0])))
    columns, sizes = left_basis @ u[:, :kept], sizes[:kept]
    rows = v[:kept] @ right_basis.T  # (kept, k), orthonormal: those that the product has
    mean_a = np.tensordot(shares, np.stack(a_factors), axes=1)
    seen = mean_a @ rows.T  # (r, kept): the mean's rows in them
    if kept and np.linalg.cond(seen) > _MOST_STRETCH:
        return _balanced(rows, columns, sizes, rank)
    back = np.linalg.pinv(seen)
    # Components that the product lacks keep their A: what B does not read leaves B·A as it is.
    unread = mean_a - seen @ rows
    return seen @ rows + unread - seen @ (back @ unread), (columns * sizes) @ back


def _balanced(rows: Matrix, columns: Matrix, sizes: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """The product's components in the order of their sizes, half of each in either factor."""
    a, b, halves = np.zeros((rank, rows.shape[1])), np.zeros((len(columns), rank)), np.sqrt(sizes)
    a[: len(halves)], b[:, : len(halves)] = halves[:, None] * rows, columns * halves
    return a, b


def pairs(manifest: Manifest, rank: int, key: str) -> list[tuple[str, str]]:
    """The names of each adapter's A and B.

    Raises InputError, which begins with `key`, for adapters whose components are not all of one product.
    """
    shapes = {spec.name: spec.shape for spec in manifest.tensors}
    found_pairs = []
    for first in shapes:
        if found := _FIRST.search(first):
            second = f"{first[: found.start()]}.lora_{found.group(1) or ''}B{first[found.end() :]}"
            if shapes[first][0] != rank or shapes[second][1] != rank:
                raise InputError(
                    f"{key} takes an adapter for one product, and '{first}' holds those of several experts, one after "
                    "the other; set tuning.lora.experts to false, or choose another"
                )
            found_pairs.append((first, second))
    return found_pairs


def flat(tensor: Float32Array) -> Matrix:
    """A factor as a matrix: that of a convolution has more axes."""
    return tensor.reshape(len(tensor), -1).astype(np.float64)
