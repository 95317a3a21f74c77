"""FedProx, SCAFFOLD and fresh moments: against closed forms, the paper's own algorithm, and central training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.site import SiteService
from core_training.engine.correction import Correction, FedProx, Scaffold, Start, correction_of
from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.models.parameters import manifest_of, read_parameters, write_parameters
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.stages.base import load_stage
from simulations import simulate
from simulations.enrolment import enrolments_of
from strategies.messages import TrainOrder, Update
from strategies.mixing import weighted_mean
from tests import tiny
from tests.test_laws import Killed, central_digest

MakeRecipe = Callable[..., Recipe]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
ROUNDS = {"kind": "federated", "rounds": 4, "local_steps": 2}
JUDGE = "def length(prompts, completions):\n    return [len(text) / 10 for text in completions]\n"


def moved(state: TrainableState, spread: float = 0.05) -> TrainableState:
    noise = np.random.default_rng(0).normal(0, spread, state.buffer.shape).astype(np.float32)
    return TrainableState(state.manifest, state.buffer + noise)


# On quadratics, where every optimum is known


class Quadratic:
    """A site whose loss is ½(w − b)ᵀA(w − b), and its local training."""

    def __init__(self, seed: int, correction: Correction | None) -> None:
        random = np.random.default_rng(seed)
        self.curvature = np.diag(random.uniform(0.5, 4.0, 3))
        self.optimum = random.normal(0, 3.0, 3)
        self.parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=0.05)
        self.correction = correction
        self.last_round = 0

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return self.curvature @ (w - self.optimum)

    def train(self, state: TrainableState, round_number: int, steps: int = 10) -> TrainableState:
        write_parameters(self.parameters, state)
        start = Start.NEXT_ROUND if round_number == self.last_round + 1 else Start.LATER_ROUND
        self.last_round = round_number
        if self.correction is None:
            self._steps(steps)
        else:
            with self.correction.during(self.parameters, self.optimizer, start):
                self._steps(steps)
        return read_parameters(self.parameters)

    def _steps(self, steps: int) -> None:
        (w,) = self.parameters.values()
        for _ in range(steps):
            w.grad = torch.tensor(self.gradient(w.detach().numpy()), dtype=torch.float32)
            self.optimizer.step()


def federate(
    sites: list[Quadratic], weights: list[float], rounds: int, absent: Callable[[int], Iterable[int]] = lambda _: ()
) -> list[np.ndarray]:
    """The state after each round; `absent(round)` are the sites that miss it."""
    manifest = manifest_of(sites[0].parameters)
    state = TrainableState(manifest, np.zeros(3, dtype=np.float32))
    path = []
    for number in range(1, rounds + 1):
        present = [i for i in range(len(sites)) if i not in absent(number)]
        states = [sites[i].train(state, number) for i in present]
        state = weighted_mean(states, [weights[i] for i in present])
        path.append(state.buffer.copy())
    return path


def optimum_of_all(sites: list[Quadratic], weights: list[float]) -> np.ndarray:
    curvature = sum(p * site.curvature for site, p in zip(sites, weights, strict=True))
    slope = sum(p * site.curvature @ site.optimum for site, p in zip(sites, weights, strict=True))
    return np.linalg.solve(curvature, slope)


def scaffold_of_the_paper(sites: list[Quadratic], rounds: int, steps: int = 10, rate: float = 0.05) -> list[np.ndarray]:
    """Algorithm 1 of Karimireddy et al. 2020, option II, all clients sampled, global step size 1; in float64."""
    x, c = np.zeros(3), np.zeros(3)
    controls = [np.zeros(3) for _ in sites]
    path = []
    for _ in range(rounds):
        ends, changes = [], []
        for i, site in enumerate(sites):
            y = x.copy()
            for _ in range(steps):
                y -= rate * (site.gradient(y) - controls[i] + c)
            new = controls[i] - c + (x - y) / (steps * rate)
            changes.append(new - controls[i])
            ends.append(y - x)
            controls[i] = new
        x = x + np.mean(ends, axis=0)
        c = c + np.mean(changes, axis=0)
        path.append(x)
    return path


def test_scaffold_is_the_algorithm_of_the_paper() -> None:
    sites = [Quadratic(seed, Scaffold()) for seed in range(4)]
    ours = federate(sites, [1.0] * 4, rounds=12)
    np.testing.assert_allclose(ours, scaffold_of_the_paper(sites, rounds=12), atol=1e-4)


def test_scaffold_reaches_the_optimum_of_all_where_fedavg_does_not() -> None:
    weights = [1.0, 3.0, 6.0]
    plain = [Quadratic(seed, None) for seed in range(3)]
    optimum = optimum_of_all(plain, weights)
    assert np.abs(federate(plain, weights, rounds=60)[-1] - optimum).max() > 0.1
    corrected = [Quadratic(seed, Scaffold()) for seed in range(3)]
    np.testing.assert_allclose(federate(corrected, weights, rounds=60)[-1], optimum, atol=1e-4)


def test_scaffold_gets_over_rounds_that_a_site_missed() -> None:
    """A site absent for a while is no lasting bias, and its return does not throw the others off."""
    weights = [1.0, 3.0, 6.0]
    sites = [Quadratic(seed, Scaffold()) for seed in range(3)]
    path = federate(sites, weights, rounds=80, absent=lambda number: [2] if 15 <= number < 25 else [])
    optimum = optimum_of_all(sites, weights)
    np.testing.assert_allclose(path[-1], optimum, atol=1e-4)
    without = np.abs(path[23] - optimum).max()
    assert without > 0.1
    assert all(np.abs(state - optimum).max() < 1.05 * without for state in path[24:])


def test_scaffold_bears_rounds_that_moved_nothing() -> None:
    site = Quadratic(0, Scaffold())
    site.optimizer.param_groups[0]["lr"] = 0.0
    start = read_parameters(site.parameters)
    assert site.train(start, 1).digest == start.digest
    assert site.train(moved(start), 2).is_finite()


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_fedprox_ends_a_long_round_where_site_and_start_balance(mu: float) -> None:
    """A(w − b) + μ(w − w₀) = 0."""
    site = Quadratic(1, FedProx(mu))
    start = moved(read_parameters(site.parameters), 1.0)
    end = site.train(start, 1, steps=2000).buffer
    identity = np.eye(3)
    balance = np.linalg.solve(
        site.curvature + mu * identity, site.curvature @ site.optimum + mu * start.buffer.astype(np.float64)
    )
    np.testing.assert_allclose(end, balance, atol=1e-4)


def test_a_strong_pull_keeps_a_site_at_the_state_it_was_sent() -> None:
    site = Quadratic(1, FedProx(mu=19.0))
    for number in (1, 2):
        start = moved(read_parameters(site.parameters), 3.0)
        free = np.abs(Quadratic(1, None).train(start, 1).buffer - start.buffer).max()
        held = np.abs(site.train(start, number).buffer - start.buffer).max()
        assert held < 0.3 * free


# In the engine


@pytest.fixture
def stage_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes of several stages, each with its own columns of the same records."""
    columns = {"sft": ["prompt", "completion"], "dpo": ["prompt", "chosen", "rejected"], "ppo": ["prompt"]}
    (tmp_path / "judge.py").write_text(JUDGE)

    def make(stage: str, **sections: Any) -> Recipe:
        records = [
            dict(zip(columns[stage], (r["question"], r["answer"], f"No {r['answer']}"), strict=False))
            for r in tiny.questions(0, 16)
        ]
        judge = {"reward_function": f"{tmp_path / 'judge.py'}:length", "max_new_tokens": 6}
        return make_recipe(
            stage=stage,
            tuning={"mode": "full"},
            data={"train": str(tiny.write_jsonl(tmp_path / f"{stage}.jsonl", records)), "columns": {}},
            topology=ROUNDS,
            rollout=judge if stage == "ppo" else {},
            training={**SGD, **sections.pop("training", {})},
            **sections,
        )

    return make


@pytest.mark.parametrize(("stage", "pieces"), [("sft", 1), ("sft", 4), ("dpo", 1), ("dpo", 2)])
def test_fedprox_adds_mu_times_the_way_gone_to_each_step(stage_recipe: MakeRecipe, stage: str, pieces: int) -> None:
    """w₂ = w₁ − lr(g₁ + μ(w₁ − w₀)), once a step however many batches it has; the reported loss is without it."""
    mu, rate, start = 3.0, SGD["learning_rate"], None
    ends, losses = {}, {}
    for steps, pull in ((1, 0.0), (2, 0.0), (2, mu)):
        recipe = stage_recipe(
            stage,
            training={"per_device_train_batch_size": 8 // pieces, "gradient_accumulation_steps": pieces},
            aggregation={"proximal_mu": pull},
        )
        engine = open_engine(recipe)
        start = moved(engine.read_state())
        engine.begin_round(start)
        losses[steps, pull] = engine.train(steps).loss_last
        ends[steps, pull] = engine.read_state().buffer
    assert start is not None
    expected = ends[2, 0.0] - rate * mu * (ends[1, 0.0] - start.buffer)
    assert np.abs(expected - ends[2, 0.0]).max() > 1e-4
    np.testing.assert_allclose(ends[2, mu], expected, atol=1e-6)
    assert losses[2, mu] == losses[2, 0.0]


def test_fedprox_enters_every_update_of_a_rollout(stage_recipe: MakeRecipe) -> None:
    """A step of ppo with two passes is two steps of the optimizer."""
    mu, rate = 3.0, SGD["learning_rate"]
    ends = {}
    for passes, pull in ((1, 0.0), (2, 0.0), (2, mu)):
        recipe = stage_recipe(
            "ppo", ppo={"num_ppo_epochs": passes, "num_mini_batches": 1}, aggregation={"proximal_mu": pull}
        )
        engine = open_engine(recipe)
        engine.train(1)
        ends[passes, pull] = engine.read_state().buffer
    pulled = -rate * mu * (ends[1, 0.0] - engine.initial_state.buffer)
    assert np.abs(pulled).max() > 1e-4
    np.testing.assert_allclose(ends[2, mu], ends[2, 0.0] + pulled, atol=1e-6)


def two_sites(make_recipe: MakeRecipe, files: list[Path], steps: int, scaffold: bool, rate: float) -> list[Engine]:
    """Engines of two sites on one base, each with all its records in one batch."""
    recipes = [
        make_recipe(
            tuning={"mode": "full"},
            data={"train": str(path), "eval_fraction": 0.0},
            training={**SGD, "learning_rate": rate, "per_device_train_batch_size": 64},
            topology={"kind": "federated", "rounds": 40, "local_steps": steps},
            aggregation={"scaffold": scaffold},
        )
        for path in files
    ]
    base = BaseModel(recipes[0])
    stages = [load_stage(recipe, base) for recipe in recipes]
    return [Engine(stage, load_dataset(stage.recipe, stage)) for stage in stages]


def rounds_of(engines: list[Engine], rounds: int, steps: int) -> TrainableState:
    state = engines[0].initial_state
    for _ in range(rounds):
        weights, states = [], []
        for engine in engines:
            engine.begin_round(state)
            weights.append(float(engine.train(steps).weight))
            states.append(engine.read_state())
        state = weighted_mean(states, weights)
    return state


def test_scaffold_with_many_local_steps_stays_near_central_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two sites that answer differently."""
    rounds, steps, rate = 12, 4, 0.02
    first = [{**record, "answer": "always the heart"} for record in tiny.questions(0, 10)]
    second = [{**record, "answer": f"no: {record['answer']}"} for record in tiny.questions(1, 20)]
    files = [tiny.write_jsonl(tmp_path / "first.jsonl", first), tiny.write_jsonl(tmp_path / "second.jsonl", second)]
    recipe = make_recipe(
        tuning={"mode": "full"},
        data={"train": [str(path) for path in files], "eval_fraction": 0.0},
        training={**SGD, "learning_rate": rate, "per_device_train_batch_size": 64, "max_steps": rounds * steps},
    )
    central = open_engine(recipe)
    central.train(rounds * steps)
    goal = central.read_state().buffer
    plain, corrected = (
        np.linalg.norm(rounds_of(two_sites(make_recipe, files, steps, scaffold, rate), rounds, steps).buffer - goal)
        for scaffold in (False, True)
    )
    assert corrected < 0.5 * plain


def test_scaffold_with_one_local_step_is_fedavg(make_recipe: MakeRecipe, site_files: list[Path]) -> None:
    """All gradients are taken at the state that all were sent: there is no drift to correct."""
    ends = [
        rounds_of(two_sites(make_recipe, site_files[:2], 1, scaffold, rate=0.1), rounds=5, steps=1)
        for scaffold in (False, True)
    ]
    np.testing.assert_allclose(ends[0].buffer, ends[1].buffer, atol=1e-6)


def test_a_site_that_missed_rounds_takes_one_plain_round(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    """What it sent before says nothing of where the others have got to since."""
    payloads = {}
    enrolment = enrolments_of(["one"], "federated")["one"]
    for scaffold in (False, True):
        (engine, _) = two_sites(make_recipe, site_files[:2], 2, scaffold, rate=0.1)
        text = engine._recipe.to_yaml()
        service = SiteService("one", lambda _, engine=engine: engine, tmp_path / str(scaffold), enrolment)
        service._open("run", text)
        for number in (1, 3, 4):
            order = TrainOrder(
                run_id="run",
                round=number,
                steps=2,
                evaluate=number == 3,
                manifest_digest=engine.manifest.digest,
                payload=moved(engine.initial_state, 0.05 * number).to_bytes(),
            )
            payloads[scaffold, number] = Update.open(service.handle(order.envelope())).payload
    assert payloads[True, 1] == payloads[False, 1]
    assert payloads[True, 3] == payloads[False, 3]
    assert payloads[True, 4] != payloads[False, 4]


# Over whole runs


def test_one_site_under_scaffold_is_central_training_bit_for_bit(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    settings = {
        "tuning": {"mode": "full"},
        "data": {"train": str(site_files[1])},
        "training": {**SGD, "lr_scheduler_type": "cosine", "warmup_steps": 2},
        "aggregation": {"scaffold": True},
        "simulation": {"sites": [str(site_files[1])]},
    }
    central = central_digest(
        make_recipe(**{**settings, "training": {**settings["training"], "max_steps": 8}}), tmp_path
    )
    summary = simulate(make_recipe(**settings, topology=ROUNDS), RunFolder(tmp_path / "run"))
    assert summary.state_digest == central


@pytest.mark.slow
def test_scaffold_killed_and_resumed_is_as_if_never_killed_and_gossip_is_the_same(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    def run(name: str, kind: str, resume: bool = False, on_round: Any = lambda *_: None) -> str | None:
        recipe = make_recipe(
            training=SGD,
            aggregation={"scaffold": True},
            topology={"kind": kind, "rounds": 3, "local_steps": 2},
            simulation={"sites": [str(path) for path in site_files[:2]]},
        )
        return simulate(recipe, RunFolder(tmp_path / name), on_round, resume=resume).state_digest

    def kill(number: int, loss: float | None) -> None:
        if number == 2:
            raise Killed

    whole = run("whole", "federated")
    with pytest.raises(Killed):
        run("killed", "federated", on_round=kill)
    assert run("killed", "federated", resume=True) == whole
    assert run("gossip", "gossip") == whole


@pytest.mark.parametrize("correction", [{"proximal_mu": 1.0}, {"scaffold": True}])
def test_an_engine_that_is_reset_forgets_what_pulled_it(make_recipe: MakeRecipe, correction: dict[str, Any]) -> None:
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    recipe = make_recipe(aggregation=correction, topology=ROUNDS, training=sgd)
    fresh, used = open_engine(recipe), open_engine(recipe)
    fresh.train(2)
    for _ in range(2):
        used.begin_round(moved(used.read_state()))
        used.train(1)
    used.reset()
    used.train(2)
    assert used.read_state().digest == fresh.read_state().digest


def test_a_restored_engine_goes_on_with_its_pull_in_mid_round(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(aggregation={"proximal_mu": 1.0}, topology=ROUNDS)
    engine = open_engine(recipe)
    engine.begin_round(moved(engine.initial_state))
    engine.train(3)
    engine.checkpoint(tmp_path / "kept")
    engine.train(2)
    again = open_engine(recipe)
    again.restore(tmp_path / "kept")
    again.train(2)
    assert again.read_state().digest == engine.read_state().digest


# Moments


@pytest.mark.parametrize("keep", [True, False])
def test_without_kept_moments_a_round_is_that_of_a_fresh_optimizer(
    make_recipe: MakeRecipe, tmp_path: Path, keep: bool
) -> None:
    """On one record and at one learning rate, moments are all that a round takes over from the one before."""
    recipe = make_recipe(
        data={"train": str(tiny.write_jsonl(tmp_path / "one.jsonl", tiny.questions(0, 1))), "eval_fraction": 0.0},
        training={"lr_scheduler_type": "constant", "keep_optimizer": keep},
        topology=ROUNDS,
    )
    fresh, old = open_engine(recipe), open_engine(recipe)
    state = moved(fresh.initial_state)
    old.train(2)
    for engine in (fresh, old):
        engine.begin_round(state)
        engine.train(2)
    assert (fresh.read_state().digest == old.read_state().digest) != keep


def test_schedule_and_data_order_go_on_without_kept_moments(make_recipe: MakeRecipe) -> None:
    """SGD has no moments: rounds are then one training."""
    training = {**SGD, "lr_scheduler_type": "cosine", "warmup_steps": 2, "keep_optimizer": False}
    whole, rounds = (open_engine(make_recipe(training=training, topology=ROUNDS)) for _ in range(2))
    whole.train(8)
    for _ in range(4):
        rounds.train(2)
        rounds.begin_round(rounds.read_state())
    assert rounds.read_state().digest == whole.read_state().digest


# What is refused


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"training": {"optim": "adamw_torch"}, "aggregation": {"scaffold": True}}, "training.optim 'sgd' only"),
        ({"aggregation": {"scaffold": True, "proximal_mu": 0.1}}, "either 'proximal_mu' or 'scaffold'"),
        ({"aggregation": {"proximal_mu": 0.1}, "deepspeed": {"processes": 2}}, "leave out deepspeed"),
        (
            {"aggregation": {"scaffold": True, "mixing": "metropolis"}, "topology": {**ROUNDS, "kind": "gossip"}},
            "aggregation.mixing 'group'",
        ),
    ],
)
def test_a_correction_that_would_not_hold_is_refused(
    make_recipe: MakeRecipe, sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        make_recipe(**{"topology": ROUNDS, "training": SGD, **sections})


def test_a_site_that_trains_as_a_group_refuses_a_correction(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(topology=ROUNDS, aggregation={"proximal_mu": 0.1})
    as_group = recipe.model_copy(update={"deepspeed": recipe.deepspeed.model_copy(update={"processes": 2})})
    with pytest.raises(InputError, match=r"deepspeed: .* train without it"):
        correction_of(as_group)


def test_central_training_is_not_corrected(make_recipe: MakeRecipe) -> None:
    assert correction_of(make_recipe(aggregation={"proximal_mu": 0.1, "scaffold": True})) is None
