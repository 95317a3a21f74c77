"""FedSVD (Lee et al. 2025, "Adaptive Orthogonalization for Private Federated Learning with LoRA"): after a round
each adapter's A becomes the right singular vectors of its B·A, and B what makes the product the same.

Sites train B alone, so a round's mean of B beside their one A is the mean of the products, and this asks for no more
than that mean. A's rows are orthonormal afterwards: a gradient of B is no longer than that of the product, which under
differential privacy is clipped and gets noise. The rows span what A's did before. Pure.
"""

from __future__ import annotations

import numpy as np

from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from strategies.flexlora import Matrix, flat, pairs

_KEY = "aggregation.adapters: fedsvd"


def orthonormal(state: TrainableState, rank: int) -> TrainableState:
    """The state with both factors of each adapter made anew; computed in float64, all else is as it was.

    Raises InputError for adapters of more components than inputs, and for those of several experts.
    """
    after = TrainableState(state.manifest, state.buffer.copy())
    tensors = dict(after.tensors())
    for first, second in pairs(state.manifest, rank, _KEY):
        a, b = flat(tensors[first]), flat(tensors[second])
        if a.shape[1] < rank:
            raise InputError(f"{_KEY}: {rank} rows of length {a.shape[1]} ('{first}') cannot be orthonormal; lower r")
        a, b = refactored(a, b)
        tensors[first][...] = a.reshape(tensors[first].shape)
        tensors[second][...] = b.reshape(tensors[second].shape)
    return after


def refactored(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """A⁺ = Vᵀ (r, k) and B⁺ = U·S (d, r) of B·A = U·S·Vᵀ, found from the factors' triangles; r ≤ k.

    Where the product has fewer components than A has rows, the others are orthonormal all the same, and B does not
    read them. The largest value of each row is positive, so that one product has one pair.
    """
    basis, triangle = np.linalg.qr(a.T)  # (k, r), (r, r): A = triangleᵀ · basisᵀ
    read = b @ triangle.T
    _, _, v = np.linalg.svd(np.linalg.qr(read, mode="r"))  # v is (r, r) also where B has fewer rows
    rows = v @ basis.T
    signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)])[:, None]
    return signs * rows, read @ (signs * v).T
