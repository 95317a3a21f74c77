"""FedSVD against the SVD of the product, written out, and in whole runs: masked, killed and with void rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder, Summary
from server.rewinding import rewind
from server.run_store import RunStore
from strategies.adapter_sharing import Turn, fedsvd
from strategies.fedsvd import orthonormal, refactored
from strategies.messages import Envelope
from tests.failing_sites import Fault, federate

MakeRecipe = Callable[..., Recipe]
R = 4
NAMES = {"head.weight": (3,), "q.lora_A.weight": (R, 9), "q.lora_B.weight": (12, R)}
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}


def factors(seed: int, outputs: int = 12, inputs: int = 9) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(R, inputs)), random.normal(size=(outputs, R))


@pytest.mark.parametrize("seed", range(5))
def test_a_is_the_products_right_singular_vectors_and_b_the_rest(seed: int) -> None:
    a, b = factors(seed)
    u, sizes, v = np.linalg.svd(b @ a)
    new_a, new_b = refactored(a, b)
    signs = np.sign((new_a * v[:R]).sum(axis=1))
    np.testing.assert_allclose(new_a, signs[:, None] * v[:R], atol=1e-10)
    np.testing.assert_allclose(new_b, u[:, :R] * sizes[:R] * signs, atol=1e-10)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 9), (2, 9), (12, R)])
@pytest.mark.parametrize("trained", range(R + 1))
def test_the_product_stays_and_the_rows_are_orthonormal_however_few_components_it_has(
    trained: int, outputs: int, inputs: int
) -> None:
    a, b = factors(7, outputs, inputs)
    b[:, trained:] = 0
    new_a, new_b = refactored(a, b)
    np.testing.assert_allclose(new_a @ new_a.T, np.eye(R), atol=1e-12)
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-12 * np.abs(b @ a).max() + 1e-15)


def test_one_product_has_one_pair() -> None:
    a, b = factors(3)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(R, R)))
    np.testing.assert_allclose(refactored(turn.T @ a, b @ turn)[0], refactored(a, b)[0], atol=1e-10)


def test_a_state_keeps_its_products_and_all_that_is_no_factor() -> None:
    manifest = Manifest.of({**NAMES, "wte.lora_embedding_A": (R, 30), "wte.lora_embedding_B": (5, R)})
    values = np.random.default_rng(1).standard_normal(manifest.size).astype(np.float32)
    state = TrainableState(manifest, values)
    before, after = dict(state.tensors()), dict(orthonormal(state, R).tensors())
    np.testing.assert_array_equal(after["head.weight"], before["head.weight"])
    for first, second in (("q.lora_A.weight", "q.lora_B.weight"), ("wte.lora_embedding_A", "wte.lora_embedding_B")):
        product = before[second].astype(np.float64) @ before[first]
        error = after[second].astype(np.float64) @ after[first] - product
        assert np.abs(error).max() < 1e-6 * np.abs(product).max()
        np.testing.assert_allclose(after[first] @ after[first].T, np.eye(R), atol=1e-6)
    np.testing.assert_array_equal(state.buffer, values), "what it was given stays"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"q.lora_A.weight": (R, 3), "q.lora_B.weight": (5, R)}, "fedsvd: 4 rows of length 3 .* cannot be orthonormal"),
        ({"m.lora_A.weight": (8, 9), "m.lora_B.weight": (5, 8)}, "fedsvd takes an adapter for one product"),
    ],
)
def test_adapters_that_cannot_be_made_anew_are_refused_by_name(shapes: Any, said: str) -> None:
    manifest = Manifest.of(shapes)
    with pytest.raises(InputError, match=said):
        orthonormal(TrainableState(manifest, np.ones(manifest.size, dtype=np.float32)), R)


def test_under_plain_sgd_it_is_ffa_from_an_orthonormal_a() -> None:
    """A's rows go on spanning what they did: a turned pair takes turned steps, so it matters to Adam alone."""
    random = np.random.default_rng(0)
    wanted = random.normal(size=(12, 9))
    a, b = factors(2)
    a, b = refactored(a, b)
    turned_a, turned_b = a, b
    for _ in range(20):
        for _ in range(3):
            b = b - 0.1 * (b @ a - wanted) @ a.T
            turned_b = turned_b - 0.1 * (turned_b @ turned_a - wanted) @ turned_a.T
        turned_a, turned_b = refactored(turned_a, turned_b)
    assert np.abs(turned_a - a).max() > 0.1
    np.testing.assert_allclose(turned_b @ turned_a, b @ a, atol=1e-10)


def test_b_travels_and_in_the_end_both_differ_from_the_start() -> None:
    assert (fedsvd(0), fedsvd(1), fedsvd(2)) == (Turn(), Turn("B", "B"), Turn("B", "B"))


# Over whole runs


@pytest.fixture
def recipe(make_recipe: MakeRecipe, site_files: list[Path]) -> MakeRecipe:
    def make(privacy: dict[str, Any], sites: int = 3) -> Recipe:
        return make_recipe(
            tuning={"lora": {"r": R, "lora_alpha": 8}},
            simulation={"sites": [str(path) for path in site_files[:sites]]},
            privacy=privacy,
            topology={"kind": "federated", "rounds": 3, "local_steps": 2, "keep_rounds": 9, "minimum_sites": 1},
            aggregation={"adapters": "fedsvd"},
        )

    return make


def nobody(site: str, order: Envelope) -> None:
    return None


def states(run: Path) -> list[TrainableState]:
    store = RunStore(RunFolder(run), 9)
    return [store.read(number)[1] for number in store.rounds()]


def test_each_commit_is_orthonormal_and_masks_change_no_bit(tmp_path: Path, recipe: MakeRecipe) -> None:
    masked = federate(recipe(MASKED), tmp_path / "masked", nobody)
    plain = federate(recipe({"codec": "ring16"}), tmp_path / "plain", nobody)
    assert masked.state_digest == plain.state_digest
    for state in states(tmp_path / "plain"):
        for name, values in state.tensors():
            if "lora_A" in name:
                np.testing.assert_allclose(values @ values.T, np.eye(R), atol=1e-6)


def test_a_round_is_ffas_with_the_same_products(
    tmp_path: Path, recipe: MakeRecipe, make_recipe: MakeRecipe, site_files: list[Path]
) -> None:
    """The first round starts alike: what is committed differs in the pair of factors alone."""
    federate(recipe({}), tmp_path / "run", nobody)
    wanted = recipe({})
    ffa = wanted.model_copy(update={"aggregation": wanted.aggregation.model_copy(update={"adapters": "ffa"})})
    federate(ffa, tmp_path / "ffa", nobody)
    ours, theirs = (dict(states(tmp_path / name)[0].tensors()) for name in ("run", "ffa"))
    for first in (name for name in ours if ".lora_A." in name):
        second = first.replace("lora_A", "lora_B")
        wanted_product = theirs[second].astype(np.float64) @ theirs[first]
        assert np.abs(ours[first] - theirs[first]).max() > 1e-3
        error = np.abs(ours[second].astype(np.float64) @ ours[first] - wanted_product).max()
        assert error <= 1e-6 * np.abs(wanted_product).max()


def test_a_run_taken_back_or_with_void_rounds_goes_on_as_it_would_have(tmp_path: Path, recipe: MakeRecipe) -> None:
    whole = federate(recipe({}), tmp_path / "run", nobody)
    rewind(tmp_path / "run", 1)
    assert federate(recipe({}), tmp_path / "run", nobody).state_digest == whole.state_digest

    def lost(site: str, order: Envelope) -> str | None:
        return "before" if order.kind == "train" and order.fields["round"] == 2 else None

    summary: Summary = federate(recipe(MASKED), tmp_path / "void", lost)
    assert (summary.rounds_done, summary.void_rounds) == (3, 1)
    first, void, *_ = states(tmp_path / "void")
    assert first.digest == void.digest


def test_a_server_killed_between_rounds_goes_on_as_if_never_killed(tmp_path: Path, recipe: MakeRecipe) -> None:
    class Killed(BaseException):
        pass

    def kill(site: str, order: Envelope) -> None:
        if order.kind == "train" and order.fields["round"] == 3:
            raise Killed

    whole = federate(recipe({}), tmp_path / "whole", nobody)
    faults: list[Fault] = [kill, nobody]
    with pytest.raises(Killed):
        federate(recipe({}), tmp_path / "killed", faults[0])
    assert federate(recipe({}), tmp_path / "killed", faults[1]).state_digest == whole.state_digest


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"kind": "gossip"}}, "fedsvd: one server makes the factors anew.*choose ffa or rolora"),
        ({"aggregation": {"outer": {"step": "nesterov"}}}, "fedsvd: what aggregation.outer remembers.*choose step"),
        ({"training": {"keep_optimizer": True}}, "fedsvd: the optimizer's moments.*keep_optimizer to false"),
        ({"tuning": {"mode": "full"}}, "fedsvd: it is for the factors of LoRA"),
        ({"aggregation": {"rule": "flexlora"}}, "leave out aggregation.adapters: fedsvd"),
        ({"aggregation": {"proximal_mu": 0.1}}, "fedsvd: proximal_mu, scaffold and feddyn move all that is trained"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(make_recipe: MakeRecipe, sections: Any, said: str) -> None:
    aggregation = {"adapters": "fedsvd", **sections.pop("aggregation", {})}
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1, **sections.pop("topology", {})}
    with pytest.raises(InputError, match=said):
        make_recipe(aggregation=aggregation, topology=topology, **sections)


def test_a_site_begins_each_round_without_moments_of_factors_that_are_gone(recipe: MakeRecipe) -> None:
    from core_training.recipe.reading import parse_recipe

    made = recipe({})
    assert not made.training.keep_optimizer
    assert not parse_recipe(made.to_yaml()).training.keep_optimizer
