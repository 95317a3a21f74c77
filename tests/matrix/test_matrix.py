"""Every stage × tuning mode × topology: a sample of the cells, and all of them where MATRIX_PAGE names a page.

`make matrix` writes the table to docs/matrix.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core_training.data.examples import IGNORED, Example, Tokens
from core_training.data.rows import Collator
from core_training.engine.engine import Engine, open_engine
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.stages.rollout import Sampler, prompt_lengths
from server.run_store import RunStore
from simulations import simulate
from tests.core_training.stages.test_stage_losses import CLOSED_FORMS
from tests.matrix.cells import CELLS, SAMPLE, SAMPLED, STEPS, TOPOLOGIES, Workplace

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]


def cells_of(topology: str) -> pytest.MarkDecorator:
    """The cells of a topology that are tried."""
    tried = CELLS if os.environ.get("MATRIX_PAGE") else SAMPLE[topology]
    return pytest.mark.parametrize(("stage", "mode"), tried, ids=lambda value: value)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("matrix"), tiny_model)


@pytest.fixture(scope="module")
def central_digest(place: Workplace) -> Callable[[str, str], str]:
    """The state that a cell's central run ends with."""

    @cache
    def digest(stage: str, mode: str) -> str:
        engine = open_engine(place.recipe(stage, mode))
        engine.train(STEPS)
        return engine.read_state().digest

    return digest


def test_every_two_of_stage_mode_and_topology_meet_in_the_sample() -> None:
    tried = {(stage, mode, topology) for topology, cells in SAMPLE.items() for stage, mode in cells}
    for first, second in ((0, 1), (0, 2), (1, 2)):
        met = {(cell[first], cell[second]) for cell in tried}
        parts = (dict(CELLS).keys(), {mode for _, mode in CELLS}, TOPOLOGIES)
        assert len(met) == len(parts[first]) * len(parts[second])
    assert 4 * len(tried) == len(CELLS) * len(TOPOLOGIES)


@cells_of("central")
def test_central(place: Workplace, central_digest: Callable[[str, str], str], stage: str, mode: str) -> None:
    """The first loss is the closed form; what shall be trained changes, all of it, and nothing else; it learns.

    Every trained tensor has a gradient before an evaluation and after it, and a resumed run ends as one never stopped.
    """
    engine = open_engine(place.recipe(stage, mode))
    start_loss = loss_on_training_rows(engine)
    if stage in CLOSED_FORMS:
        model = engine._base.model.eval()
        with torch.no_grad():
            expected = CLOSED_FORMS[stage](model, model, [row[0] for row in engine._rows])
        assert start_loss == pytest.approx(float(expected), abs=1e-5)
    before = frozen_bytes(engine)
    with gradients(engine) as norms:
        first = engine.train(2)
        engine.evaluate()
        last = engine.train(1)
    assert np.isfinite([first.loss_first, last.loss_last]).all()
    for step in (-2, -1):  # before the evaluation, and after it
        assert all(norm > 0 for norm in norms[step].values()), norms[step]
    assert frozen_bytes(engine) == before
    start, now = (dict(state.tensors()) for state in (engine.initial_state, engine.read_state()))
    assert all(not np.array_equal(start[name], now[name]) for name in start)

    folder = place.folder / "checkpoints" / f"{stage}-{mode}"
    engine.checkpoint(folder)
    engine.close()
    resumed = open_engine(place.recipe(stage, mode))
    resumed.restore(folder)
    resumed.train(STEPS - 3)
    assert resumed.read_state().digest == central_digest(stage, mode)
    if stage not in SAMPLED:  # that rewards rise takes longer: tests/core_training/stages/test_policy_gradient.py
        assert loss_on_training_rows(resumed) < start_loss
    resumed.close()


@cells_of("federated")
def test_federated(
    place: Workplace,
    central_digest: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    mode: str,
) -> None:
    """One site is the central run bit for bit; one SGD step of two sites is one central step on their joined batch."""
    alone = place.recipe(stage, mode, topology={"kind": "federated", "rounds": 3, "local_steps": STEPS // 3})
    assert run(alone, place, "federated-alone").state_digest == central_digest(stage, mode)

    fix_answers(monkeypatch)
    engine = open_engine(one_step(place, stage, mode, "central"))
    start = engine.read_state()
    engine.train(1)
    central = engine.read_state()
    assert np.abs(central.buffer - start.buffer).max() > 1e-4
    run(one_step(place, stage, mode, "federated"), place, "federated-two")
    committed = RunStore(RunFolder(run_folder(place, "federated-two", stage, mode))).latest()
    assert committed is not None
    np.testing.assert_allclose(committed[1].buffer, central.buffer, atol=1e-5)


@cells_of("gossip")
def test_gossip(
    place: Workplace,
    central_digest: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    mode: str,
) -> None:
    """One node is the central run bit for bit; two nodes end with the very state of a server's mean."""
    alone = place.recipe(stage, mode, topology={"kind": "gossip", "rounds": 3, "local_steps": STEPS // 3})
    assert run(alone, place, "gossip-alone").state_digest == central_digest(stage, mode)

    fix_answers(monkeypatch)
    gossip = run(one_step(place, stage, mode, "gossip"), place, "gossip-two")
    federated = RunFolder(run_folder(place, "federated-two", stage, mode)).summary()
    if federated is None:  # where this test runs without the one above
        federated = asdict(run(one_step(place, stage, mode, "federated"), place, "federated-two"))
    assert gossip.state_digest == federated["state_digest"]


@cells_of("secure")
def test_secure(place: Workplace, stage: str, mode: str) -> None:
    """Masked updates of three sites give the state that the same codec gives in the clear, federated and by gossip."""
    topology = {"rounds": 2, "local_steps": 1}
    masked, plain, gossip = (
        run(place.recipe(stage, mode, sites=3, privacy=privacy, topology={**topology, "kind": kind}), place, name)
        for name, kind, privacy in (
            ("masked", "federated", {"secure_aggregation": True}),
            ("ring", "federated", {"codec": "ring16"}),
            ("masked-gossip", "gossip", {"secure_aggregation": True}),
        )
    )
    assert masked.state_digest == plain.state_digest == gossip.state_digest
    assert masked.void_rounds == 0


def loss_on_training_rows(engine: Engine) -> float:
    """The stage's loss on all that it trains on, as an evaluation computes it."""
    engine.launch()
    model = engine._base.model.eval()
    loss = engine._stage.evaluate(engine._current.prepared, engine._rows).loss
    assert loss is not None
    model.train()
    return loss


def one_step(place: Workplace, stage: str, mode: str, kind: str) -> Recipe:
    """Two sites of unequal size (or all their records in one place), each with all its records in its one batch."""
    updates = {"ppo": {"num_ppo_epochs": 1, "whiten_advantages": False}}.get(stage)
    return place.recipe(
        stage,
        mode,
        sites=2,
        dropout=0.0,
        training={
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 64,
            "max_steps": 1,
        },
        topology={"kind": kind, "rounds": 1, "local_steps": 1},
        **({} if updates is None else {stage: updates}),
    )


def fix_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each prompt answered in the same way wherever it is asked, in place of what chance brings."""

    def sample(self: Sampler, model: Any, prompts: Any, generations: int = 1) -> dict[str, torch.Tensor]:
        rows = []
        for ids, length in zip(prompts["input_ids"], prompt_lengths(prompts).tolist(), strict=True):
            for number in range(generations):
                answer = [10 + (int(ids[:length].sum()) * (i + 1) + 7 * number) % 200 for i in range(3 + number)]
                answer[-1] = self.stop_ids[0]
                prompt = ids[:length].numpy().copy()
                labels = np.concatenate([np.full(length, IGNORED), answer])
                rows.append((Example((Tokens(np.concatenate([prompt, answer]), labels),)),))
        return Collator(self.pad_token_id)(rows) | {"ended": torch.ones(len(rows), dtype=torch.bool)}

    monkeypatch.setattr(Sampler, "sample", sample)


def run_folder(place: Workplace, name: str, stage: str, mode: str) -> Path:
    return place.folder / "runs" / f"{name}-{stage}-{mode}"


def run(recipe: Recipe, place: Workplace, name: str) -> Any:
    folder = RunFolder(run_folder(place, name, recipe.stage, recipe.tuning.mode))
    return simulate(recipe, folder)


@contextmanager
def gradients(engine: Engine) -> Iterator[list[dict[str, float]]]:
    """The norm of each trained tensor's gradient, at every step taken meanwhile."""
    norms: list[dict[str, float]] = []

    def watch(*_: Any) -> None:
        parameters = engine._base.trainable_parameters
        norms.append({name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in parameters.items()})

    engine.launch()
    hook = engine._current.optimizer.register_step_pre_hook(watch)
    yield norms
    hook.remove()


def frozen_bytes(engine: Engine) -> dict[str, str]:
    """A digest of every parameter and buffer that is not trained; of quantised weights, of their packed bytes."""
    model = engine._base.model
    trained = {id(parameter) for parameter in engine._base.trainable_parameters.values()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors
        if id(tensor) not in trained
    }
