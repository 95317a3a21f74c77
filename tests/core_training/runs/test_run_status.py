"""What is folded from a run's events: what was undone is gone, and counts agree with what is committed."""

from __future__ import annotations

from core_training.runs.events import Event, ResumedAtRound, Rewound, Round, RoundsCompleted, RoundVoid
from core_training.runs.run_status import fold


def held(number: int, loss: float, counted: int | None = None) -> Event:
    return Round(
        round=number,
        loss=loss,
        eval_loss=None,
        seconds=1.0,
        saturated=0,
        sites={"a": {"loss": loss}},
        rounds_done=counted or number,
    )


def test_a_run_that_was_taken_back_shows_nothing_of_what_was_undone() -> None:
    status = fold(
        [
            held(1, 3.0),
            held(2, 2.0),
            RoundsCompleted(round=2, eval_loss=None),
            Rewound(round=1, rounds_done=1, without=[]),
        ]
    )
    assert (status.round, status.rounds_done, status.void_rounds, status.state) == (1, 1, 0, "starting")
    assert [point.loss for point in status.curve.values()] == [3.0]


def test_a_void_round_that_was_told_and_not_committed_is_not_counted_after_the_restart() -> None:
    told = [held(1, 3.0), RoundVoid(round=2, reason="too few"), ResumedAtRound(round=1, rounds_done=1)]
    assert (fold(told).round, fold(told).rounds_done, fold(told).void_rounds) == (1, 1, 0)
    again = fold([*told, held(2, 2.0)])
    assert (again.rounds_done, again.void_rounds) == (2, 0)
