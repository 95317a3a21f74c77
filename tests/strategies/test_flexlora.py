"""FlexLoRA against the truncated SVD of the mean product, written out."""

from __future__ import annotations

import numpy as np
import pytest

from core_training.foundation.errors import InputError
from core_training.foundation.state import Manifest, TrainableState
from strategies.flexlora import FlexLora, mean_product

R, D, K = 3, 12, 9
A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "score.weight"
MANIFEST = Manifest.of({A: (R, K), B: (D, R), HEAD: (4,)})


def factors(seed: int, sites: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """A of sites that began alike and went apart, their B, and shares."""
    random = np.random.default_rng(seed)
    first = random.normal(size=(R, K))
    shares = random.uniform(1, 5, sites)
    near = [first + 0.3 * random.normal(size=(R, K)) for _ in range(sites)]
    return near, [random.normal(size=(D, R)) for _ in range(sites)], shares / shares.sum()


def product(a: list[np.ndarray], b: list[np.ndarray], shares: np.ndarray) -> np.ndarray:
    return sum(p * second @ first for p, first, second in zip(shares, a, b, strict=True))


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, sizes, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sizes[:rank]) @ v[:rank]


@pytest.mark.parametrize("sites", [2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_the_nearest_of_its_rank_to_the_mean_product(seed: int, sites: int) -> None:
    a, b, shares = factors(seed, sites)
    first, second = mean_product(a, b, shares)
    np.testing.assert_allclose(second @ first, truncated(product(a, b, shares), R), atol=1e-10)


def test_its_a_is_the_mean_as_far_as_the_products_rows_go() -> None:
    a, b, shares = factors(1, 4)
    first, _ = mean_product(a, b, shares)
    rows = np.linalg.svd(product(a, b, shares))[2][:R]
    np.testing.assert_allclose(first, np.tensordot(shares, np.stack(a), axes=1) @ rows.T @ rows, atol=1e-10)


def test_sites_that_agree_get_back_what_they_sent() -> None:
    (a, *_), (b, *_), _ = factors(2, 2)
    first, second = mean_product([a, a], [b, b], np.array([0.25, 0.75]))
    np.testing.assert_allclose(first, a, atol=1e-10)
    np.testing.assert_allclose(second, b, atol=1e-10)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_components_that_nobody_trained_stay_as_they_began(moved: int) -> None:
    """B begins with zeros: where one is left, the product has fewer rows than A, and A's are not lost."""
    (a, *_), b, shares = factors(3, 2)
    for second in b:
        second[:, moved:] = 0
    after_a, after_b = mean_product([a, a], b, shares)
    np.testing.assert_allclose(after_b @ after_a, product([a, a], b, shares), atol=1e-10)
    assert np.linalg.matrix_rank(after_a) == R
    if moved == 0:
        np.testing.assert_allclose(after_a, a, atol=1e-12)


def test_a_mean_that_lost_a_direction_takes_its_rows_from_the_product() -> None:
    """Two sites whose A are opposite have no mean, and a product all the same."""
    (a, *_), (b, *_), _ = factors(4, 2)
    shares = np.array([0.5, 0.5])
    first, second = mean_product([a, -a], [b, -b], shares)
    np.testing.assert_allclose(second @ first, b @ a, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=0), rtol=1e-8)


def state(a: np.ndarray, b: np.ndarray, head: float) -> TrainableState:
    values = {A: a, B: b, HEAD: np.full(4, head)}
    return TrainableState(MANIFEST, np.concatenate([values[t.name].ravel() for t in MANIFEST.tensors]).astype("f4"))


def test_a_round_takes_weights_averages_the_rest_and_knows_no_order() -> None:
    a, b, shares = factors(5, 3)
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        rule = FlexLora(MANIFEST, R)
        for site in order:
            rule.add(state(a[site], b[site], float(site)), 40 * shares[site])
        results.append(rule.result())
    tensors = dict(results[0].tensors())
    np.testing.assert_allclose(tensors[B] @ tensors[A], truncated(product(a, b, shares), R), atol=1e-5)
    np.testing.assert_allclose(tensors[HEAD], shares @ [0, 1, 2], rtol=1e-6)
    assert results[0].digest == results[1].digest


def test_one_site_gets_back_its_state_bit_for_bit() -> None:
    a, b, _ = factors(6, 1)
    rule = FlexLora(MANIFEST, R)
    rule.add(state(a[0], b[0], 1.5), 7.0)
    assert rule.result().digest == state(a[0], b[0], 1.5).digest


def test_adapters_of_convolutions_and_embeddings_are_products_too() -> None:
    shapes = {
        "conv.lora_A.weight": (R, 2, 3, 3), "conv.lora_B.weight": (D, R, 1, 1),
        "words.lora_embedding_A": (R, 20), "words.lora_embedding_B": (D, R),
    }  # fmt: skip
    manifest = Manifest.of(shapes)
    random = np.random.default_rng(8)
    states = [TrainableState(manifest, random.normal(size=manifest.size).astype("f4")) for _ in range(2)]
    rule = FlexLora(manifest, R)
    for one in states:
        rule.add(one, 1.0)
    result = dict(rule.result().tensors())
    for a, b in (("conv.lora_A.weight", "conv.lora_B.weight"), ("words.lora_embedding_A", "words.lora_embedding_B")):
        of_sites = [dict(one.tensors()) for one in states]
        mean = sum(site[b].reshape(D, R) @ site[a].reshape(R, -1) for site in of_sites) / 2
        made = result[b].reshape(D, R) @ result[a].reshape(R, -1)
        np.testing.assert_allclose(made, truncated(mean, R), atol=1e-4)


def test_adapters_of_several_experts_in_one_tensor_are_refused() -> None:
    with pytest.raises(InputError, match=r"'flexlora' takes an adapter for one product, and 'layer\.lora_A\.weight'"):
        FlexLora(Manifest.of({A: (4 * R, K), B: (D, 4 * R)}), R)
