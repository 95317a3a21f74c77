"""Outer steps in a federation: what they remember is part of a commit, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, RunError
from core_training.recipe.schema import Recipe
from core_training.runs.events import OuterRate
from core_training.runs.run_folder import RunFolder
from flower_transport.in_process import InProcessGrid
from server.rewinding import rewind
from server.round_loop import run_federation
from server.run_store import RunStore
from strategies.messages import Envelope
from tests.failing_sites import federate as federate_trained
from tests.server.arithmetic_sites import ArithmeticSite, federate

MakeRecipe = Callable[..., Recipe]
STEPS = ["momentum", "nesterov", "adagrad", "adam", "yogi", "fedexp"]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(step: str, rounds: int = 4, **outer: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": rounds, "local_steps": 1, "keep_rounds": 9},
            aggregation={"outer": {"step": step, **outer}},
        )

    return make


def sites() -> dict[str, ArithmeticSite]:
    return {"a": ArithmeticSite(1.0, 10), "b": ArithmeticSite(4.0, 20)}


def states(run: Path) -> list[float]:
    """The values after each round, which are all alike."""
    store = RunStore(RunFolder(run), 9)
    return [np.unique(store.read(number)[1].buffer).item() for number in store.rounds()]


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def killed_after(folder: Path, wanted: Recipe, after: int) -> None:
    """A federation that is killed once round `after` is committed."""
    nodes = dict(enumerate(answers := sites(), start=1))

    def kill(number: int, loss: float | None) -> None:
        if number == after:
            raise Killed

    RunFolder(folder).prepare(wanted, resume=folder.exists())
    with pytest.raises(Killed):
        run_federation(
            InProcessGrid(lambda order, node: answers[nodes[node]](order), nodes),
            folder, lambda: nodes, kill, in_process=True,
        )  # fmt: skip


def test_a_federation_with_nesterov_is_where_the_formula_says(tmp_path: Path, recipe: MakeRecipe) -> None:
    """Every mean is 3 further on: v = 3, 4.5, 5.25, …, and a round moves by 3 + v/2."""
    federate(tmp_path / "run", recipe("nesterov", momentum=0.5), dict(sites()))
    np.testing.assert_allclose(states(tmp_path / "run"), np.cumsum([4.5, 5.25, 5.625, 5.8125]), rtol=1e-6)


def rates(run: Path) -> list[float]:
    return [event.rate for event in RunFolder(run).events(OuterRate)]


@pytest.mark.parametrize(
    ("numbers", "rate"),
    [((-2.0, 4.0), 120 / (2 * (40 + 1e-3))), ((1.0, 4.0), 1.0), ((-8.0, 4.0), 320 / (2 * 1e-3))],
    ids=["apart", "one way", "against each other"],
)
def test_fedexp_goes_as_far_beyond_the_mean_as_the_norms_say(
    tmp_path: Path, recipe: MakeRecipe, numbers: tuple[float, float], rate: float
) -> None:
    """Ten values, weights 1/3 and 2/3: Σpᵢ‖dᵢ‖² = 10(a² + 2b²)/3, and ‖d̄‖² = 10((a + 2b)/3)²."""
    there = {"a": ArithmeticSite(numbers[0], 10), "b": ArithmeticSite(numbers[1], 20)}
    federate(tmp_path / "run", recipe("fedexp", rounds=2), dict(there))
    mean = (numbers[0] + 2 * numbers[1]) / 3
    np.testing.assert_allclose(rates(tmp_path / "run"), [rate] * 2, rtol=1e-6)
    np.testing.assert_allclose(states(tmp_path / "run"), [rate * mean, 2 * rate * mean], rtol=1e-6)


@pytest.mark.parametrize("outer", [{"step": "nesterov", "momentum": 0.0}, {"step": "none"}], ids=lambda o: o["step"])
def test_a_step_that_adds_nothing_is_federated_averaging(
    tmp_path: Path, recipe: MakeRecipe, make_recipe: MakeRecipe, outer: dict[str, Any]
) -> None:
    plain = make_recipe(topology={"kind": "federated", "rounds": 4, "local_steps": 1})
    averaged = federate(tmp_path / "plain", plain, dict(sites()))
    assert federate(tmp_path / "run", recipe(**outer), dict(sites())).state_digest == averaged.state_digest


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("step", STEPS)
def test_a_server_killed_after_a_commit_goes_on_as_if_never_killed(
    tmp_path: Path, recipe: MakeRecipe, step: str, after: int
) -> None:
    whole = federate(tmp_path / "whole", recipe(step), dict(sites()))
    killed_after(tmp_path / "killed", recipe(step), after)
    assert federate(tmp_path / "killed", recipe(step), dict(sites())).state_digest == whole.state_digest
    assert states(tmp_path / "killed") == states(tmp_path / "whole")


@pytest.mark.parametrize("to", [0, 2])
@pytest.mark.parametrize("step", STEPS)
def test_what_a_step_remembers_is_taken_back_with_the_round(
    tmp_path: Path, recipe: MakeRecipe, step: str, to: int
) -> None:
    whole = federate(tmp_path / "run", recipe(step), dict(sites()))
    rewind(tmp_path / "run", to)
    assert federate(tmp_path / "run", recipe(step), dict(sites())).state_digest == whole.state_digest


def test_a_commit_without_what_the_step_remembers_is_damaged(tmp_path: Path, recipe: MakeRecipe) -> None:
    killed_after(tmp_path / "run", recipe("adam"), 2)
    (tmp_path / "run" / "checkpoints" / "round-000002" / "outer-second_moment.safetensors").unlink()
    with pytest.raises(RunError, match=r"round-000002 is damaged .*outer-second_moment"):
        federate(tmp_path / "run", recipe("adam"), dict(sites()))


MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}


@pytest.fixture
def trained(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(privacy: dict[str, Any], step: str = "nesterov", rounds: int = 3) -> Recipe:
        return make_recipe(
            simulation={"sites": [str(path) for path in site_files]},
            privacy=privacy,
            topology={"kind": "federated", "rounds": rounds, "local_steps": 1, "keep_rounds": 9},
            aggregation={"outer": {"step": step}},
        )

    return make


def test_fedexp_reads_the_norms_of_every_codec(tmp_path: Path, trained: MakeRecipe) -> None:
    fp32, bf16, ring = (
        federate_trained(trained({"codec": codec}, "fedexp"), tmp_path / codec, nobody) and rates(tmp_path / codec)
        for codec in ("fp32", "bf16", "ring32")
    )
    assert len(fp32) == 3
    np.testing.assert_allclose(bf16, fp32, rtol=1e-2)
    np.testing.assert_allclose(ring, fp32, rtol=1e-4)


def nobody(site: str, order: Envelope) -> None:
    return None


@pytest.mark.parametrize("step", ["nesterov", "adam"])
def test_masks_change_no_bit_of_a_run_with_an_outer_step(tmp_path: Path, trained: MakeRecipe, step: str) -> None:
    masked = federate_trained(trained(MASKED, step), tmp_path / "masked", nobody)
    plain = federate_trained(trained({"codec": "ring16"}, step), tmp_path / "plain", nobody)
    assert masked.state_digest == plain.state_digest
    assert masked.eval_loss == plain.eval_loss


def test_a_void_round_changes_nothing_that_a_step_remembers(tmp_path: Path, trained: MakeRecipe) -> None:
    def fault(site: str, order: Envelope) -> str | None:
        return "before" if order.kind == "train" and order.fields["round"] in (1, 3) else None

    run = tmp_path / "run"
    summary = federate_trained(trained(MASKED), run, fault)
    assert (summary.rounds_done, summary.void_rounds) == (3, 2)
    kept = [
        [path.read_bytes() for path in sorted((run / "checkpoints" / f"round-{number:06d}").glob("*.safetensors"))]
        for number in range(1, 6)
    ]
    assert [len(files) for files in kept] == [1, 2, 2, 2, 2]
    assert kept[1] == kept[2]
    assert kept[2] != kept[3]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"kind": "gossip"}}, "aggregation.outer: it steps from one state that all nodes hold"),
        ({"aggregation": {"scaffold": True}, "training": {"optim": "sgd"}}, "aggregation.outer: SCAFFOLD takes"),
        ({"aggregation": {"outer": {"step": "adam", "momentum": 0.9}}}, "momentum: step 'adam' has none"),
        ({"aggregation": {"outer": {"step": "none", "tau": 0.1}}}, "tau: step 'none' has none"),
        ({"aggregation": {"outer": {"step": "momentum", "betas": [0.9, 0.99]}}}, "betas: step 'momentum' has none"),
        ({"aggregation": {"outer": {"step": "adam", "betas": [0.9]}}}, "aggregation.outer.betas"),
        ({"aggregation": {"outer": {"step": "adam", "learning_rate": 0}}}, "aggregation.outer.learning_rate"),
        ({"aggregation": {"outer": {"step": "lion"}}}, "aggregation.outer.step"),
    ],
)
def test_an_outer_step_that_cannot_be_is_refused_with_the_reason(
    make_recipe: MakeRecipe, sections: dict[str, Any], said: str
) -> None:
    aggregation = {"outer": {"step": "nesterov"}, **sections.get("aggregation", {})}
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.get("topology", {})}
    with pytest.raises(InputError, match=said):
        make_recipe(**{**sections, "aggregation": aggregation, "topology": topology})


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"privacy": MASKED},
            "fedexp goes by each update's norm, which under privacy.secure_aggregation is a site's own",
        ),
        (
            {"topology": {"kind": "gossip"}, "privacy": {"codec": "ring16"}},
            "fedexp goes by each update's norm, and nodes of a ring's group see their sum alone",
        ),
        ({"aggregation": {"rule": "median"}}, "fedexp goes by the norms of all updates, which rule 'median' does not"),
    ],
)
def test_fedexp_is_refused_where_nobody_sees_or_trusts_a_norm(
    make_recipe: MakeRecipe, sections: dict[str, Any], said: str
) -> None:
    aggregation = {"outer": {"step": "fedexp"}, **sections.pop("aggregation", {})}
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.pop("topology", {})}
    with pytest.raises(InputError, match=said):
        make_recipe(aggregation=aggregation, topology=topology, **sections)


def test_a_recipe_writes_down_what_a_step_takes_and_reads_it_back(recipe: MakeRecipe) -> None:
    from core_training.recipe.reading import parse_recipe

    for step, expected in {
        "none": (1.0, None, None, None),
        "nesterov": (1.0, 0.5, None, None),
        "yogi": (0.01, None, [0.9, 0.99], 1e-3),
    }.items():
        outer = parse_recipe(recipe(step).to_yaml()).aggregation.outer
        assert (outer.learning_rate, outer.momentum, outer.betas, outer.tau) == expected
