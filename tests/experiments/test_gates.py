"""Gates and the figures that they are on."""

from __future__ import annotations

import pytest

from core_training.foundation.errors import InputError
from experiments.figures import check_name, figure, figures_of
from experiments.gates import parse_gate

SUMMARY = {
    "status": "completed",
    "eval_loss": 2.5,
    "train_loss_last": None,
    "metrics": {"accuracy": 0.75},
    "sites": {"st.mary": {"eval_loss": 2.0}},
}


@pytest.mark.parametrize(
    ("text", "value", "passes"),
    [
        ("<= 3.0", 3.0, True),
        ("< 3", 3.0, False),
        (">=.5", 0.5, True),
        ("> 1e-3", 0.001, False),
        ("<= base + 0.02", 2.02, True),
        ("<= base + 0.02", 2.03, False),
        (">= base - 0.5", 1.5, True),
        ("< base * 0.5", 1.0, False),
        ("> base", 2.1, True),
        ("<= 3.0", float("nan"), False),
    ],
)
def test_a_gate_is_the_arithmetic_that_it_says(text: str, value: float, passes: bool) -> None:
    gate = parse_gate("eval_loss", text, "gates")
    assert gate.passes(value, gate.limit(lambda name: {"base": 2.0}[name])) is passes


@pytest.mark.parametrize("text", ["3.0", "<=", "== 3", "<= 3 + base", "<= a b", 3, None, "<= base + x"])
def test_what_is_no_gate_is_refused(text: object) -> None:
    with pytest.raises(InputError, match="is no gate"):
        parse_gate("eval_loss", text, "gates")


def test_figures_have_dotted_names_and_only_numbers_are_figures() -> None:
    assert figures_of(SUMMARY) == {"eval_loss": 2.5, "metrics.accuracy": 0.75, "sites.st.mary.eval_loss": 2.0}
    assert figure(SUMMARY, "sites.st.mary.eval_loss", "x") == 2.0
    with pytest.raises(InputError, match=r"did you mean 'metrics\.accuracy'"):
        figure(SUMMARY, "metrics.acuracy", "x")


@pytest.mark.parametrize(
    ("name", "said"),
    [("eval_los", "did you mean 'eval_loss'"), ("status", "no summary has"), ("metrics", "metrics.NAME"),
     ("sites.a.eval_lost", "did you mean 'eval_loss'"), ("eval_loss.x", "no summary has")],
)  # fmt: skip
def test_a_figure_that_no_summary_has_is_named_with_its_nearest(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_name(name, "objective")


@pytest.mark.parametrize("name", ["eval_loss", "metrics.reward", "seconds.total", "sites.st.mary.eval_loss"])
def test_figures_that_summaries_have_are_taken(name: str) -> None:
    check_name(name, "objective")
