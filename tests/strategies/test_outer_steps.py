"""Outer steps against PyTorch's SGD, Flower's FedAdam, FedAdagrad and FedYogi, and the mean itself."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from core_training.foundation.errors import DivergedError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.sections.aggregation import Outer
from strategies.draws import PIECE
from strategies.outer_steps.outer_step import OuterStep, take_step

SIZE = PIECE + 1000
MANIFEST = Manifest.of({"a": (SIZE,)})
ROUNDS = 6


def step_of(**keys: Any) -> OuterStep:
    outer = Outer(**keys)
    step: OuterStep = outer.step_part.make(outer, outer)
    return step


def state_of(values: Any) -> TrainableState:
    return TrainableState(MANIFEST, np.array(values, dtype=np.float32))


def changes() -> list[np.ndarray]:
    """What the mean of each round adds to its start: of many magnitudes."""
    random = np.random.default_rng(7)
    return [random.normal(size=SIZE) * 10.0 ** random.integers(-6, -1, SIZE) for _ in range(ROUNDS)]


def rounds_of(step: OuterStep) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each round's start and mean, as float64, and the state that the step makes of them."""
    start, memory = state_of(FIRST), {}
    for change in changes():
        mean = state_of(start.buffer + change)
        given = start.buffer.astype(np.float64), mean.buffer.astype(np.float64)
        start, memory = take_step(step, start, mean, memory)
        yield *given, start.buffer


FIRST = np.random.default_rng(3).normal(size=SIZE)


@pytest.mark.parametrize("rate", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_momentum_is_that_of_torch_with_start_less_mean_as_the_gradient(
    name: str, momentum: float, rate: float
) -> None:
    value = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    nesterov = name == "nesterov" and momentum > 0
    optimizer = torch.optim.SGD([value], lr=rate, momentum=momentum, nesterov=nesterov)
    for start, mean, after in rounds_of(step_of(step=name, learning_rate=rate, momentum=momentum)):
        value.data[:], value.grad = torch.tensor(start), torch.tensor(start - mean)
        optimizer.step()
        np.testing.assert_allclose(after, value.detach().numpy(), rtol=0, atol=1e-6)


FLOWER = {"adagrad": "FedAdagrad", "adam": "FedAdam", "yogi": "FedYogi"}


@pytest.mark.parametrize("name", FLOWER)
def test_adaptive_steps_are_flowers_with_the_published_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's v begins with 0, the paper's with τ²; Flower's FedAdam corrects the moments' start, the paper's not."""
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import strategy
    from flwr.serverapp.strategy import FedAvg

    rate, tau = 0.05, 1e-3
    flower = getattr(strategy, FLOWER[name])(eta=rate, tau=tau)
    flower.v_t = {"a": np.full(SIZE, tau**2)}
    rounds = rounds_of(step_of(step=name, learning_rate=rate, tau=tau))
    for number, (start, mean, after) in enumerate(rounds, start=1):
        flower.current_arrays = {"a": start}
        record = ArrayRecord({"a": Array(mean)})
        monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_, record=record: (record, None))
        if name == "adam":
            flower.eta = rate * (1 - 0.9 ** (number + 1.0)) / np.sqrt(1 - 0.99 ** (number + 1.0))
        arrays, _ = flower.aggregate_train(number, [])
        np.testing.assert_allclose(after, arrays["a"].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keys",
    [{"step": "none"}, {"step": "momentum", "momentum": 0.0}, {"step": "nesterov", "momentum": 0.0}],
    ids=lambda keys: keys["step"],
)
def test_a_step_that_adds_nothing_is_the_mean_bit_for_bit(keys: dict[str, Any]) -> None:
    random = np.random.default_rng(5)
    mean = (random.normal(size=SIZE) * 10.0 ** random.integers(-30, 5, SIZE)).astype(np.float32)
    mean[::7], mean[::11] = -0.0, 0.0
    after, memory = take_step(step_of(**keys), state_of(FIRST), state_of(mean), {})
    after, _ = take_step(step_of(**keys), state_of(FIRST), state_of(mean), memory)
    assert after.buffer.tobytes() == mean.tobytes()


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_a_learning_rate_alone_goes_so_many_times_the_way(rate: float) -> None:
    mean = FIRST + changes()[0]
    after, memory = take_step(step_of(step="none", learning_rate=rate), state_of(FIRST), state_of(mean), {})
    np.testing.assert_allclose(after.buffer, FIRST + rate * changes()[0], rtol=1e-6, atol=1e-6)
    assert memory == {}


STEPS = ["momentum", "nesterov", "adagrad", "adam", "yogi"]


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_is_given_stays_as_it_is_but_for_the_mean(name: str) -> None:
    step, start = step_of(step=name), state_of(FIRST)
    _, memory = take_step(step, start, state_of(FIRST + changes()[0]), {})
    before = [start.digest, *(one.digest for one in memory.values())]
    mean = state_of(FIRST + changes()[1])
    after, later = take_step(step, start, mean, memory)
    assert [start.digest, *(one.digest for one in memory.values())] == before
    assert np.shares_memory(after.buffer, mean.buffer)
    assert all(memory[key].digest != later[key].digest for key in step.remembers)
    read_only = state_of(FIRST + changes()[1])
    read_only.buffer.flags.writeable = False
    assert take_step(step, start, read_only, memory)[0].digest == after.digest


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_no_memory_but_for_what_it_remembers(name: str) -> None:
    manifest = Manifest.of({"a": (64 * PIECE,)})
    start, mean = (TrainableState(manifest, np.zeros(manifest.size, dtype=np.float32)) for _ in range(2))
    step = step_of(step=name)
    tracemalloc.start()
    try:
        take_step(step, start, mean, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(step.remembers) * 4 * manifest.size + 20 * 8 * PIECE


def test_each_value_is_stepped_by_itself() -> None:
    """The same values in any order, and so in any piece."""
    order = np.random.default_rng(1).permutation(SIZE)
    for name, mean in itertools.product(STEPS, [FIRST + changes()[0]]):
        straight, _ = take_step(step_of(step=name), state_of(FIRST), state_of(mean), {})
        mixed, _ = take_step(step_of(step=name), state_of(FIRST[order]), state_of(mean[order]), {})
        np.testing.assert_array_equal(mixed.buffer, straight.buffer[order])


def test_a_state_that_is_no_number_any_more_ends_the_run_and_says_why() -> None:
    start, mean = state_of(np.zeros(SIZE)), state_of(np.full(SIZE, 1e38))
    with pytest.raises(DivergedError, match=r"aggregation\.outer: .* lower its learning_rate or momentum"):
        take_step(step_of(step="none", learning_rate=100.0), start, mean, {})
