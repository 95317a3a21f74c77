"""FedDyn against the paper's algorithm in NumPy, at its optimum, and in whole runs whose sites fail."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_training.engine.correction import FedDyn, Start, correction_of
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.models.parameters import manifest_of, read_parameters, write_parameters
from core_training.parts.outer_steps.feddyn import DynamicRegularisation
from core_training.recipe.schema import Recipe
from core_training.recipe.sections.aggregation import Outer
from core_training.runs.run_folder import RunFolder
from server.rewinding import rewind
from server.run_store import RunStore
from simulations.sites import SitePool
from strategies.messages import Envelope
from strategies.mixing import weighted_mean
from strategies.outer_steps.outer_step import take_step
from tests.failing_sites import federate
from tests.server.arithmetic_sites import ArithmeticSite
from tests.server.arithmetic_sites import federate as federate_numbers

MakeRecipe = Callable[..., Recipe]
Absent = Callable[[int], Collection[int]]
ALPHA, RATE, STEPS, SITES = 0.5, 0.05, 10, 4
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}


class Quadratic:
    """A site whose loss is ½(w − b)ᵀA(w − b)."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.curvature = random.uniform(0.5, 4.0, 3)
        self.optimum = random.normal(0, 0.5, 3)

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return self.curvature * (w - self.optimum)


def all_present(_number: int) -> Collection[int]:
    return ()


def of_the_paper(sites: list[Quadratic], rounds: int, absent: Absent = all_present) -> list[np.ndarray]:
    """Algorithm 1 of Acar et al. 2021 in float64, its minimisation by gradient descent; h counts all sites."""
    x, h = np.zeros(3), np.zeros(3)
    gradients = [np.zeros(3) for _ in sites]
    path = []
    for number in range(1, rounds + 1):
        ends = []
        for i, site in enumerate(sites):
            if i in absent(number):
                continue
            y = x.copy()
            for _ in range(STEPS):
                y -= RATE * (site.gradient(y) - gradients[i] + ALPHA * (y - x))
            gradients[i] = gradients[i] - ALPHA * (y - x)
            ends.append(y)
        h = h - ALPHA * sum(y - x for y in ends) / len(sites)
        x = np.mean(ends, axis=0) - h / ALPHA
        path.append(x)
    return path


def ours(
    sites: list[Quadratic], rounds: int, absent: Absent = all_present, lost: Absent = all_present, told: bool = True
) -> list[np.ndarray]:
    """The same by the site's correction and the server's step; the update of a site that is `lost` enters no mean.

    `told`: whether the sites hear of it.
    """
    parameters = [{"w": torch.nn.Parameter(torch.zeros(3))} for _ in sites]
    optimizers = [torch.optim.SGD(one.values(), lr=RATE) for one in parameters]
    corrections = [FedDyn(DynamicRegularisation(alpha=ALPHA)) for _ in sites]
    outer = Outer(step="feddyn")
    state, memory = TrainableState(manifest_of(parameters[0]), np.zeros(3, dtype=np.float32)), {}
    left_out, path = [False] * len(sites), []
    for number in range(1, rounds + 1):
        ends = []
        for i, site in enumerate(sites):
            if i in absent(number):
                continue
            write_parameters(parameters[i], state)
            w = parameters[i]["w"]
            missed = left_out[i] and told
            with corrections[i].during(parameters[i], optimizers[i], Start.NEXT_ROUND, left_out=missed):
                for _ in range(STEPS):
                    w.grad = torch.tensor(site.gradient(w.detach().numpy()), dtype=torch.float32)
                    optimizers[i].step()
            left_out[i] = i in lost(number)
            if not left_out[i]:
                ends.append(read_parameters(parameters[i]))
        step = outer.step_part.make(outer, outer).of_sites(len(ends), len(sites))
        state, memory = take_step(step, state, weighted_mean(ends, [1.0] * len(ends)), memory)
        path.append(state.buffer.copy())
    return path


def optimum_of_all(sites: Iterable[Quadratic]) -> np.ndarray:
    """The minimum of the sum of the losses: Σaᵢbᵢ/Σaᵢ."""
    return sum(s.curvature * s.optimum for s in sites) / sum(s.curvature for s in sites)  # type: ignore[no-any-return]


@pytest.fixture
def quadratics() -> list[Quadratic]:
    return [Quadratic(seed) for seed in range(SITES)]


def some_absent(number: int) -> Collection[int]:
    return {number % SITES} if number % 3 else {number % SITES, (number + 1) % SITES}


@pytest.mark.parametrize("absent", [all_present, some_absent], ids=["all", "some absent"])
def test_it_is_the_algorithm_of_the_paper(quadratics: list[Quadratic], absent: Absent) -> None:
    np.testing.assert_allclose(ours(quadratics, 12, absent), of_the_paper(quadratics, 12, absent), rtol=0, atol=1e-6)


def test_it_reaches_the_optimum_of_all_where_averaging_settles_elsewhere(quadratics: list[Quadratic]) -> None:
    """Averaging settles at Σ(1 − ρᵢ)bᵢ/Σ(1 − ρᵢ) with ρᵢ = (1 − ηaᵢ)ᴷ, as each site goes (1 − ρᵢ) of its way."""
    shares = [1 - (1 - RATE * site.curvature) ** STEPS for site in quadratics]
    averaged = sum(p * s.optimum for p, s in zip(shares, quadratics, strict=True)) / sum(shares)
    optimum = optimum_of_all(quadratics)
    assert np.abs(averaged - optimum).max() > 0.03
    np.testing.assert_allclose(ours(quadratics, 80)[-1], optimum, rtol=0, atol=1e-6)


def test_it_reaches_it_though_sites_are_absent_as_h_counts_all(quadratics: list[Quadratic]) -> None:
    np.testing.assert_allclose(ours(quadratics, 400, some_absent)[-1], optimum_of_all(quadratics), rtol=0, atol=1e-5)


def test_an_update_that_was_lost_leaves_no_trace_if_the_site_is_told_so(quadratics: list[Quadratic]) -> None:
    def lost(number: int) -> Collection[int]:
        return {2} if number in (3, 4, 9) else ()

    optimum = optimum_of_all(quadratics)
    np.testing.assert_allclose(ours(quadratics, 100, lost=lost)[-1], optimum, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        ours(quadratics, 12, lost=lost), of_the_paper(quadratics, 12, absent=lost), rtol=0, atol=1e-6
    )
    assert np.abs(ours(quadratics, 100, lost=lost, told=False)[-1] - optimum).max() > 0.01, "else it stays for ever"


# Over whole runs


@pytest.fixture
def recipe(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(privacy: dict[str, Any], rounds: int = 4, **topology: Any) -> Recipe:
        return make_recipe(
            simulation={"sites": [str(path) for path in site_files]},
            training=SGD,
            privacy=privacy,
            topology={"kind": "federated", "rounds": rounds, "local_steps": 2, "keep_rounds": 9, **topology},
            aggregation={"outer": {"step": "feddyn", "feddyn": {"alpha": 0.2}}},
        )

    return make


MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}


def test_a_server_goes_beyond_the_mean_by_the_sum_of_all_changes_over_all_sites(
    tmp_path: Path, recipe: MakeRecipe
) -> None:
    """Two sites add 1 and 4 each round: the mean is 2.5 further, and the sum of changes over both grows by 2.5."""
    federate_numbers(tmp_path / "run", recipe({}), {"a": ArithmeticSite(1.0, 1), "b": ArithmeticSite(4.0, 1)})
    store = RunStore(RunFolder(tmp_path / "run"), 9)
    ends = [np.unique(store.read(number)[1].buffer).item() for number in store.rounds()]
    np.testing.assert_allclose(ends, np.cumsum([5.0, 7.5, 10.0, 12.5]), rtol=1e-6)


def nobody(site: str, order: Envelope) -> None:
    return None


def sums(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the server remembers after the last round, and the sum of what the sites do, as they would be told."""
    store = RunStore(RunFolder(run), 9)
    last = store.rounds()[-1]
    progress, state = store.read(last)
    at_server = store.memory(last, ["changes"], state.manifest)["changes"].buffer
    at_sites = np.zeros(state.manifest.size)
    for site in (run / "sites").iterdir():
        folder = max((site).glob("**/checkpoints/round-*"))

        def kept(name: str, folder: Path = folder) -> np.ndarray:
            path = folder / f"correction-{name}.safetensors"
            return TrainableState.from_bytes(path.read_bytes(), state.manifest).buffer if path.exists() else 0.0

        at_sites += kept("counted")
        if progress.taken_in.get(site.name) == int(folder.name.removeprefix("round-")):
            at_sites += kept("trained") - kept("center")
    return at_server, at_sites


def lost_after(site: str, order: Envelope) -> str | None:
    """One site's update is trained and lost in round 2, another is not asked in time in round 3."""
    if order.kind != "train":
        return None
    if order.fields["round"] == 2 and site == "site1":
        return "after"
    return "before" if order.fields["round"] == 3 and site == "site0" else None


@pytest.mark.parametrize(
    ("privacy", "close"),
    [({}, 1e-6), ({"codec": "bf16"}, 1e-2), ({"codec": "ring32"}, 1e-6), (MASKED, 5e-3)],
    ids=["fp32", "bf16", "ring32", "masked"],
)
@pytest.mark.parametrize("fault", [nobody, lost_after])
def test_what_the_server_remembers_is_the_sum_of_what_the_sites_do(
    tmp_path: Path, recipe: MakeRecipe, privacy: dict[str, Any], close: float, fault: Any
) -> None:
    summary = federate(recipe(privacy, minimum_sites=2), tmp_path / "run", fault)
    assert summary.rounds_done == 4
    at_server, at_sites = sums(tmp_path / "run")
    assert np.abs(at_server).max() > 1e-3
    assert np.abs(at_server - at_sites).max() < close * np.abs(at_server).max()


@pytest.mark.parametrize("privacy", [{}, MASKED], ids=["fp32", "masked"])
def test_sites_that_a_round_does_not_draw_are_counted_all_the_same(
    tmp_path: Path, recipe: MakeRecipe, privacy: dict[str, Any]
) -> None:
    wanted = recipe(privacy, rounds=5, sites_per_round=2)
    federate(wanted, tmp_path / "run", nobody)
    at_server, at_sites = sums(tmp_path / "run")
    assert np.abs(at_server - at_sites).max() < 5e-3 * np.abs(at_server).max()
    progress = RunStore(RunFolder(tmp_path / "run"), 9).read(5)[0]
    assert len(progress.sites) == 3
    assert sum(site.rounds or 0 for site in progress.sites.values()) == 10


def test_masks_change_no_bit(tmp_path: Path, recipe: MakeRecipe) -> None:
    masked = federate(recipe(MASKED), tmp_path / "masked", nobody)
    plain = federate(recipe({"codec": "ring16"}), tmp_path / "plain", nobody)
    assert masked.state_digest == plain.state_digest


def test_a_void_round_changes_nothing_that_is_remembered(tmp_path: Path, recipe: MakeRecipe) -> None:
    """All have trained in it, and the sum was not opened."""

    def fault(site: str, order: Envelope) -> str | None:
        return "after" if order.kind == "train" and order.fields["round"] == 2 else None

    summary = federate(recipe(MASKED), tmp_path / "run", fault)
    assert (summary.rounds_done, summary.void_rounds) == (4, 1)
    at_server, at_sites = sums(tmp_path / "run")
    assert np.abs(at_server - at_sites).max() < 5e-3 * np.abs(at_server).max()
    assert federate(recipe(MASKED), tmp_path / "whole", nobody).state_digest != summary.state_digest  # other batches


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


@pytest.mark.parametrize("privacy", [{}, MASKED], ids=["fp32", "masked"])
def test_a_run_killed_in_a_round_or_taken_back_goes_on_as_if_never(
    tmp_path: Path, recipe: MakeRecipe, privacy: dict[str, Any]
) -> None:
    def kill(site: str, order: Envelope) -> None:
        if order.kind == "train" and order.fields["round"] == 3 and site == "site1":
            raise Killed

    whole = federate(recipe(privacy), tmp_path / "whole", nobody)
    with pytest.raises(Killed):
        federate(recipe(privacy), tmp_path / "killed", kill)
    assert federate(recipe(privacy), tmp_path / "killed", nobody).state_digest == whole.state_digest
    if not privacy:
        rewind(tmp_path / "killed", 1)
        assert federate(recipe(privacy), tmp_path / "killed", nobody).state_digest == whole.state_digest


def in_round(number: int) -> Any:
    def kill(site: str, order: Envelope) -> None:
        if order.kind == "train" and order.fields["round"] == number:
            raise Killed

    return kill


def away_in(*rounds: int) -> Any:
    def away(site: str, order: Envelope) -> str | None:
        return "before" if site == "site2" and order.kind == "train" and order.fields["round"] in rounds else None

    return away


@pytest.mark.parametrize("stays_up", [False, True], ids=["restarted", "running"])
@pytest.mark.parametrize("to", [0, 1])
def test_a_site_that_is_away_after_a_run_was_taken_back_counts_nothing_that_was_undone(
    tmp_path: Path, recipe: MakeRecipe, to: int, stays_up: bool
) -> None:
    wanted = recipe({}, rounds=6, minimum_sites=2)
    pool = SitePool(wanted, tmp_path / "run" / "sites")
    running = pool if stays_up else None
    try:
        with pytest.raises(Killed):
            federate(wanted, tmp_path / "run", in_round(5), running=running)
        rewind(tmp_path / "run", to)
        summary = federate(wanted, tmp_path / "run", away_in(1, 2, 3, 4), running=running)
    finally:
        pool.close()
    assert summary.sites["site2"].rounds == to + 2
    at_server, at_sites = sums(tmp_path / "run")
    assert np.abs(at_server - at_sites).max() < 1e-6 * np.abs(at_server).max()


def test_a_site_killed_as_it_lets_go_what_was_undone_counts_none_of_it(
    tmp_path: Path, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains in round 3 anew: what it had of round 4 came after another round 3."""
    wanted = recipe({}, rounds=6, minimum_sites=2)
    with pytest.raises(Killed):
        federate(wanted, tmp_path / "run", in_round(5))
    rewind(tmp_path / "run", 1)

    def killed(folder: Path, *_: str) -> None:
        if "site2" in folder.parts:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("client.site.remove_later", killed)
        with pytest.raises(Killed):
            federate(wanted, tmp_path / "run", away_in(2))
    assert federate(wanted, tmp_path / "run", away_in(4)).sites["site2"].rounds == 4
    at_server, at_sites = sums(tmp_path / "run")
    assert np.abs(at_server - at_sites).max() < 1e-6 * np.abs(at_server).max()


def test_a_site_that_lost_what_the_server_counts_is_set_aside_with_the_reason(
    tmp_path: Path, recipe: MakeRecipe
) -> None:
    import shutil

    def lose(site: str, order: Envelope) -> None:
        if order.kind == "train" and order.fields["round"] == 3 and site == "site2":
            for folder in (tmp_path / "run" / "sites" / site).glob("**/checkpoints/round-*"):
                shutil.rmtree(folder)

    class Gone(BaseException):
        pass

    def end(site: str, order: Envelope) -> None:
        if order.kind == "train" and order.fields["round"] == 3:
            raise Gone

    with pytest.raises(Gone):
        federate(recipe({}), tmp_path / "run", end)
    summary = federate(recipe({}), tmp_path / "run", lose)
    assert summary.sites["site2"].rounds == 2
    reasons = [str(line) for line in RunFolder(tmp_path / "run").lines("quarantined")]
    assert any("does not have what it trained in round 2 any more" in reason for reason in reasons)


def test_an_engine_goes_on_in_mid_round_after_a_restore(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    wanted = make_recipe(
        training=SGD,
        topology={"kind": "federated", "rounds": 4, "local_steps": 4},
        aggregation={"outer": {"step": "feddyn"}},
    )
    engine = open_engine(wanted)
    for left_out in (False, False, True):
        engine.begin_round(engine.read_state(), left_out=left_out)
        engine.train(3)
    engine.checkpoint(tmp_path / "kept")
    engine.train(2)
    again = open_engine(wanted)
    again.restore(tmp_path / "kept")
    again.train(2)
    assert again.read_state().digest == engine.read_state().digest


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {**SGD, "optim": "adamw_torch"}}, "feddyn: .* plain SGD alone; choose training.optim sgd"),
        ({"training": {**SGD, "optim_args": "momentum=0.9"}}, "feddyn: .* plain SGD alone"),
        ({"topology": {"kind": "gossip"}}, "feddyn: one server keeps .*choose aggregation.scaffold"),
        ({"aggregation": {"proximal_mu": 0.1}}, "feddyn: it corrects local steps itself; leave out"),
        ({"aggregation": {"scaffold": True}}, "feddyn: it corrects local steps itself; leave out"),
        ({"aggregation": {"rule": "median"}}, "feddyn: it needs the mean of all sites, aggregation.rule 'fedavg'"),
        ({"aggregation": {"weights": "loss_units"}}, "each site counts as one; choose equal"),
        ({"aggregation": {"adapters": "ffa"}}, "proximal_mu, scaffold and feddyn move all"),
        ({"aggregation": {"outer": {"step": "feddyn", "learning_rate": 0.5}}}, "set aggregation.outer.feddyn.alpha"),
        ({"aggregation": {"outer": {"step": "feddyn", "momentum": 0.5}}}, "momentum: step 'feddyn' has none"),
        ({"privacy": {"codec": "ring16", "keep": 0.5}}, "privacy.keep: under .*feddyn all of a change has to travel"),
        ({"deepspeed": {"processes": 2}}, "feddyn: it changes gradients that DeepSpeed keeps to itself"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(make_recipe: MakeRecipe, sections: Any, said: str) -> None:
    aggregation = {"outer": {"step": "feddyn"}, **sections.pop("aggregation", {})}
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.pop("topology", {})}
    with pytest.raises(InputError, match=said):
        make_recipe(**{"training": SGD, **sections}, aggregation=aggregation, topology=topology)


def test_unset_weights_are_equal_and_central_training_is_not_corrected(
    make_recipe: MakeRecipe, recipe: MakeRecipe
) -> None:
    assert recipe({}).aggregation.weights == "equal"
    assert isinstance(correction_of(recipe({})), FedDyn)
    assert correction_of(make_recipe(training=SGD, aggregation={"outer": {"step": "feddyn"}})) is None
