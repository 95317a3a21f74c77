"""The end of a round by time, on a clock of the test's own."""

from __future__ import annotations

import pytest

from core_training.engine.timed_round import TimedRound


class Loop:
    """A loop whose steps take as long as they are said to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.place = 0
        self.stopped = False

    def skip(self, steps: int) -> None:
        assert steps > 0
        self.place += steps

    def stop(self) -> None:
        self.stopped = True


def places_of(seconds: float, durations: list[float]) -> tuple[list[int], int, bool]:
    """The schedule's place after each step, at the round's end, and whether time ended it."""
    loop = Loop()
    round_ = TimedRound(loop, seconds, clock=lambda: loop.now)
    places = []
    for number, duration in enumerate(durations, start=1):
        assert not loop.stopped, "no step follows the one that ended the round"
        loop.now += duration
        loop.place += 1  # the loop's own schedule moves with each step
        round_.after_step(number, 0)
        places.append(loop.place)
    round_.end()
    return places, loop.place, loop.stopped


@pytest.mark.parametrize(
    ("durations", "places", "stopped"),
    [
        ([0.5, 0.5, 0.5, 0.75], [500, 1000, 1500, 2000], True),
        ([8.0], [2000], True),
        ([0.5], [500], False),
        ([0.0, 0.0, 0.125], [1, 2, 125], False),
    ],
    ids=["as many as there is time for", "one at least", "asked for one", "too fast for a clock"],
)
def test_a_schedule_goes_with_the_time_and_ends_each_round_at_one_place(
    durations: list[float], places: list[int], stopped: bool
) -> None:
    assert places_of(2.0, durations) == (places, 2000, stopped)


def test_a_loop_of_as_many_steps_as_places_ends_the_round_without_any_time() -> None:
    assert places_of(0.01, [0.0] * 10) == (list(range(1, 11)), 10, False)
