"""Mixing rules against closed forms, exact arithmetic and the law that group gossip is federated averaging."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.state import Manifest, TrainableState
from strategies.mixing import (
    GRAPHS,
    Contribution,
    GroupMean,
    Metropolis,
    complete,
    exponential,
    metropolis_weight,
    one_peer,
    partner_in,
    ring,
    weighted_mean,
)

MANIFEST = Manifest.of({"a": (3, 2), "b": (5,)})


def names(count):
    return [f"site{number}" for number in range(count)]


def state(values):
    return TrainableState(MANIFEST, np.asarray(values, dtype=np.float32))


def random_state(rng):
    return state(rng.standard_normal(MANIFEST.size) * 10.0 ** rng.integers(-3, 4))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
def test_weighted_mean_equals_exact_rational_arithmetic(seed, weights):
    rng = np.random.default_rng(seed)
    states = [random_state(rng) for _ in weights]
    mean = weighted_mean(states, [float(weight) for weight in weights])
    for position, value in enumerate(mean.buffer):
        terms = [
            Fraction(weight) * Fraction(float(one.buffer[position]))
            for one, weight in zip(states, weights, strict=True)
        ]
        exact = sum(terms) / sum(weights)
        largest = max(abs(float(one.buffer[position])) for one in states)
        assert abs(float(value) - float(exact)) <= np.spacing(np.float32(largest))


def test_one_node_alone_keeps_its_state_exactly():
    alone = random_state(np.random.default_rng(1))
    for rule in (GroupMean(), Metropolis()):
        mixed = rule.mix(Contribution("site0", alone, 12345.0, 0), [], ["site0"])
        assert mixed.digest == alone.digest


def test_every_member_of_a_group_computes_the_same_bits_in_whatever_order_updates_came():
    rng = np.random.default_rng(2)
    roster = names(5)
    all_of_them = [Contribution(name, random_state(rng), float(rng.integers(1, 999)), 4) for name in roster]
    digests = set()
    for own in all_of_them:
        others = [one for one in all_of_them if one is not own]
        rng.shuffle(others)
        digests.add(GroupMean().mix(own, others, roster).digest)
    assert len(digests) == 1


def metropolis_matrix(graph):
    """The weights that nodes use with each other, as one matrix, rows and columns in the graph's order."""
    matrix = np.zeros((len(graph), len(graph)))
    for i, name in enumerate(graph):
        for j, other in enumerate(graph):
            if other in graph[name]:
                matrix[i, j] = metropolis_weight(len(graph[name]), len(graph[other]))
        matrix[i, i] = 1.0 - math.fsum(matrix[i])
    return matrix


@pytest.mark.parametrize("graph", ["complete", "ring", "exponential"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_metropolis_matrix_is_symmetric_doubly_stochastic_and_not_negative(graph, count):
    matrix = metropolis_matrix(GRAPHS[graph](names(count)))
    assert np.array_equal(matrix, matrix.T)
    assert np.allclose(matrix.sum(axis=0), 1, atol=1e-15)
    assert np.allclose(matrix.sum(axis=1), 1, atol=1e-15)
    assert (matrix >= 0).all()


@pytest.mark.parametrize("count", [4, 5, 8, 12])
def test_the_ring_contracts_by_the_published_factor(count):
    rho = np.linalg.norm(metropolis_matrix(ring(names(count))) - 1 / count, 2)
    assert rho == pytest.approx((1 + 2 * math.cos(2 * math.pi / count)) / 3, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 6, 8, 20, 33, 100])
def test_the_exponential_graph_contracts_as_its_circulant_matrix_and_faster_than_one_way(count):
    """Eigenvalues of a circulant: (1 + Σ cos(2πmo/n)) / (1 + d) over offsets o; one way 1 − ρ = 2/(1 + ⌈log₂ n⌉)."""
    powers = math.ceil(math.log2(count))
    offsets = {way * 2**power % count for power in range(powers) for way in (1, -1)} - {0}
    eigenvalues = [
        (1 + sum(math.cos(2 * math.pi * m * offset / count) for offset in offsets)) / (1 + len(offsets))
        for m in range(1, count)
    ]
    rho = np.linalg.norm(metropolis_matrix(exponential(names(count))) - 1 / count, 2)
    assert rho == pytest.approx(max(map(abs, eigenvalues)), abs=1e-12)
    assert rho < 1 - 2 / (1 + powers) or count == 2
    assert len(offsets) <= max(2 * powers - 1, 1) or count & (count - 1)


def test_neighbours_on_the_exponential_graph_are_powers_of_two_away():
    assert Metropolis().partners("site0", names(10), "exponential") == (
        *("site1", "site2", "site4"), *("site6", "site8", "site9"),
    )  # fmt: skip
    assert Metropolis().partners("site0", names(1), "exponential") == ()


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_one_partner_at_a_time_leads_a_power_of_two_to_the_very_mean(count):
    roster, rounds = names(count), (count - 1).bit_length()
    product = np.eye(count)
    for number in range(1, rounds + 1):
        product = round_matrix(roster, number) @ product
    assert np.array_equal(product, np.full((count, count), 1 / count))
    assert np.array_equal(round_matrix(roster, rounds + 1), round_matrix(roster, 1)), "and so on in turn"


@pytest.mark.parametrize("count", [3, 5, 6, 7, 13, 20])
def test_one_partner_at_a_time_keeps_the_mean_and_contracts_for_any_number(count):
    roster, rounds = names(count), (count - 1).bit_length()
    product = np.eye(count)
    for number in range(1, rounds + 1):
        matrix = round_matrix(roster, number)
        assert np.array_equal(matrix, matrix.T)
        assert ((matrix == 0.5).sum(axis=1) <= 2).all()
        product = matrix @ product
    assert np.allclose(product.sum(axis=0), 1)
    assert np.linalg.norm(product - 1 / count, 2) < 0.8


def round_matrix(roster, number):
    """The weights of a round with one partner at a time."""
    assert all(set(partner_in(number, name, roster)) <= one_peer(roster)[name] for name in roster)
    graph = {name: frozenset(partner_in(number, name, roster)) for name in roster}
    return metropolis_matrix(graph)


def test_the_complete_graph_averages_in_one_step():
    assert np.allclose(metropolis_matrix(complete(names(6))), 1 / 6)


@pytest.mark.parametrize("graph", ["complete", "ring", "exponential"])
def test_a_metropolis_step_is_the_matrix_times_the_states_keeps_the_mean_and_contracts(graph):
    rng = np.random.default_rng(3)
    roster, rule = names(6), Metropolis()
    before = {name: random_state(rng) for name in roster}
    after = {}
    for name in roster:
        parts = {one: Contribution(one, before[one], 1.0, len(rule.partners(one, roster, graph))) for one in roster}
        after[name] = rule.mix(parts[name], [parts[one] for one in rule.partners(name, roster, graph)], roster)
    stacked = np.stack([before[name].buffer for name in roster]).astype(np.float64)
    mixed = np.stack([after[name].buffer for name in roster]).astype(np.float64)
    matrix = metropolis_matrix(GRAPHS[graph](roster))
    assert np.allclose(mixed, matrix @ stacked, rtol=1e-6, atol=1e-6 * np.abs(stacked).max())
    assert np.allclose(mixed.mean(axis=0), stacked.mean(axis=0), atol=1e-6 * np.abs(stacked).max())
    rho = np.linalg.norm(matrix - 1 / 6, 2)
    spread = np.linalg.norm(stacked - stacked.mean(axis=0))
    assert np.linalg.norm(mixed - mixed.mean(axis=0)) <= rho * spread * (1 + 1e-6) + 1e-5 * spread


def test_a_node_that_hears_from_nobody_keeps_its_own_state():
    own = Contribution("site1", random_state(np.random.default_rng(4)), 10.0, 2)
    assert Metropolis().mix(own, [], names(4)).digest == own.state.digest


def test_ring_neighbours_and_the_small_rings():
    assert Metropolis().partners("site0", names(4), "ring") == ("site1", "site3")
    assert Metropolis().partners("site0", names(2), "ring") == ("site1",)
    assert Metropolis().partners("site0", names(1), "ring") == ()


def test_the_weight_of_an_edge_is_that_of_its_end_with_more_neighbours() -> None:
    assert metropolis_weight(1, 3) == metropolis_weight(3, 1) == 1 / 4
