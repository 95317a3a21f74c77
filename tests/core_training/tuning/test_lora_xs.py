"""LoRA-XS, over sites Fed-SB: its factors, the mean of its cores, and the LoRA adapter that comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.models.parameters import write_parameters
from core_training.models.probe import logits_of
from core_training.models.results import export_adapter, export_model, find_result, load_result
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.tuning.base import load_tuning
from core_training.tuning.lora_xs import first_vectors
from simulations import simulate
from tests.families.walk import WALKS, Family
from tests.test_laws import central_digest

MakeRecipe = Callable[..., Recipe]
R = 6
XS: dict[str, Any] = {"mode": "lora_xs", "lora_xs": {"r": R, "lora_alpha": 12}}
ROUNDS = {"kind": "federated", "rounds": 3, "local_steps": 2}


def moved(base: BaseModel, seed: int) -> TrainableState:
    noise = np.random.default_rng(seed).normal(0, 0.3, base.manifest.size).astype(np.float32)
    return TrainableState(base.manifest, base.initial_state.buffer + noise)


def weights_with(base: BaseModel, state: TrainableState) -> dict[str, np.ndarray]:
    """The weights with the adapter in them."""
    write_parameters(base.trainable_parameters, state)
    model: Any = base.model
    model.merge_adapter()
    merged = {n: p.detach().double().numpy() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    model.unmerge_adapter()
    return merged


@pytest.fixture(scope="module")
def xs(tiny_model: Path) -> BaseModel:
    from core_training.recipe.reading import parse_recipe

    return BaseModel(
        parse_recipe(f"{{model: {{name_or_path: '{tiny_model}'}}, stage: sft, tuning: {XS}, data: {{train: none}}}}")
    )


def test_r_squared_values_a_layer_are_trained_and_nothing_else(xs: BaseModel) -> None:
    assert xs.manifest.tensors
    assert all(spec.name.endswith(".lora_A.core.weight") and spec.shape == (R, R) for spec in xs.manifest.tensors)
    assert not xs.initial_state.buffer.any(), "so a run starts from the model itself"


def test_it_reaches_all_linear_layers_whose_own_weights_alone_count(make_recipe: MakeRecipe, tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    (reach,) = load_tuning(make_recipe(tuning=XS)).reach(plain)
    assert (reach.share, reach.left_out) == (1.0, {})


def test_the_factors_are_the_first_singular_vectors() -> None:
    weight = np.random.default_rng(0).normal(size=(20, 15)) * np.linspace(3, 0.1, 15)
    a, b = (one.double().numpy() for one in first_vectors(torch.tensor(weight), R))
    u, _, v = np.linalg.svd(weight)
    signs = np.sign((a * v[:R]).sum(axis=1))
    np.testing.assert_allclose(a, signs[:, None] * v[:R], atol=0.03)  # eight bits, and of a subspace
    np.testing.assert_allclose(b, u[:, :R] * signs, atol=0.03)
    assert (a[np.arange(R), np.abs(a).argmax(axis=1)] > 0).all()


def test_where_all_components_are_taken_they_are_exact_but_for_the_eight_bits() -> None:
    weight = np.random.default_rng(1).normal(size=(8, 2 * R))
    a, b = (one.double().numpy() for one in first_vectors(torch.tensor(weight), R))
    u, _, v = np.linalg.svd(weight)
    np.testing.assert_allclose(np.abs(a), np.abs(v[:R]), rtol=2**-8, atol=1e-12)
    np.testing.assert_allclose(np.abs(b), np.abs(u[:, :R]), rtol=2**-8, atol=1e-12)


def test_of_a_large_weight_they_hold_nearly_as_much_as_any() -> None:
    random = np.random.default_rng(5)
    weight = random.normal(size=(200, 30)) @ np.diag(0.8 ** np.arange(30)) @ random.normal(size=(30, 150))
    a, b = (one.double().numpy() for one in first_vectors(torch.tensor(weight), R))
    held, most = np.linalg.norm(b.T @ weight @ a.T), np.linalg.norm(np.linalg.svd(weight)[1][:R])
    assert held > 0.98 * most
    np.testing.assert_allclose(a @ a.T, np.eye(R), atol=0.01)
    np.testing.assert_allclose(b.T @ b, np.eye(R), atol=0.01)


def test_last_bits_of_the_weights_do_not_show_in_the_factors() -> None:
    """What unlike machines' arithmetic does is far smaller: rounded to eight bits it is gone."""
    weight = torch.tensor(np.random.default_rng(2).normal(size=(40, 30)))
    noise = 1 + 1e-14 * torch.tensor(np.random.default_rng(3).normal(size=(40, 30)))
    for one, other in zip(first_vectors(weight, R), first_vectors(weight * noise, R), strict=True):
        assert torch.equal(one, other)


def test_the_mean_of_cores_is_exactly_the_mean_of_the_products(xs: BaseModel) -> None:
    shares, states = (0.2, 0.3, 0.5), [moved(xs, seed) for seed in range(3)]
    values = sum(p * s.buffer.astype(np.float64) for p, s in zip(shares, states, strict=True))
    mean = TrainableState(xs.manifest, np.float32(values))
    of_sites, together = [weights_with(xs, state) for state in states], weights_with(xs, mean)
    for name, weight in together.items():
        expected = sum(p * one[name] for p, one in zip(shares, of_sites, strict=True))
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6)


def test_the_update_is_b_r_a_in_numpy(xs: BaseModel) -> None:
    state = moved(xs, 4)
    plain, changed = weights_with(xs, xs.initial_state), weights_with(xs, state)
    parameters = {name: p.detach().double().numpy() for name, p in xs.model.named_parameters()}
    for name, weight in changed.items():
        layer = name.removesuffix("base_layer.weight")
        core = dict(state.tensors())[f"{layer.removeprefix('base_model.model.')}lora_A.core.weight"]
        a, b = (parameters[f"{layer}{one}"] for one in ("lora_A.default.down.weight", "lora_B.default.weight"))
        np.testing.assert_allclose(weight - plain[name], 12 / R * b @ core @ a, rtol=0, atol=1e-6)


def test_one_site_is_central_training_and_masks_change_no_bit(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    def run(name: str, sites: list[Path], **sections: Any) -> str | None:
        recipe = make_recipe(
            **{"tuning": XS, "topology": ROUNDS, "simulation": {"sites": [str(path) for path in sites]}, **sections}
        )
        return simulate(recipe, RunFolder(tmp_path / name)).state_digest

    central = make_recipe(tuning=XS, data={"train": str(site_files[1])}, training={"max_steps": 6})
    assert run("one", site_files[1:2], data={"train": str(site_files[1])}) == central_digest(
        central, tmp_path / "central"
    )
    masked = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}
    assert run("masked", site_files, privacy=masked) == run("plain", site_files, privacy={"codec": "ring16"})


def test_what_is_exported_of_a_server_is_a_plain_lora_adapter(
    make_recipe: MakeRecipe, site_files: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    """The server knows the cores alone; with the base they are factors that PEFT loads, of the same logits."""
    recipe = make_recipe(
        tuning=XS, topology=ROUNDS, simulation={"sites": [str(path) for path in site_files]},
        training={"learning_rate": 0.05},
    )  # fmt: skip
    simulate(recipe, RunFolder(tmp_path / "run"))
    result = find_result(tmp_path / "run")
    with pytest.raises((ValueError, KeyError), match="LORA_XS"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(result.folder))
    trained = load_result(result)
    assert trained.trainable_parameters
    export_adapter(result, tmp_path / "exported")
    names = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in names} == {"A.weight", "B.weight"}
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits_of(plain)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "exported"))
    torch.testing.assert_close(logits_of(theirs), logits_of(trained.model), rtol=0, atol=1e-5)  # type: ignore[arg-type]
    assert (logits_of(trained.model) - before).abs().max() > 1e-3
    export_model(result, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(whole), logits_of(trained.model), rtol=0, atol=1e-5)


def test_sites_with_other_factors_start_from_another_digest(make_recipe: MakeRecipe) -> None:
    one, other = (BaseModel(make_recipe(tuning={"mode": "lora_xs", "lora_xs": {"r": r}})) for r in (4, 5))
    assert one.initial_digest != other.initial_digest
    changed = BaseModel(make_recipe(tuning={"mode": "lora_xs", "lora_xs": {"r": 4}}))
    assert changed.initial_digest == one.initial_digest
    again = BaseModel(make_recipe(tuning={"mode": "lora_xs", "lora_xs": {"r": 4}}))
    with torch.no_grad():
        next(p for n, p in again.model.named_parameters() if "lora_B" in n).view(-1)[0] += 0.25
    from core_training.models.base_model import _frozen_digest

    recipe = make_recipe(tuning={"mode": "lora_xs", "lora_xs": {"r": 4}})
    assert _frozen_digest(again.model, recipe) != _frozen_digest(one.model, recipe)


def test_an_unset_rank_fits_the_smallest_layer(make_recipe: MakeRecipe) -> None:
    base = BaseModel(make_recipe(tuning={"mode": "lora_xs"}))
    (shape,) = {spec.shape for spec in base.manifest.tensors}
    smallest = min(min(p.shape) for n, p in base.model.named_parameters() if n.endswith("base_layer.weight"))
    assert shape == (min(64, smallest),) * 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 4000}, r"tuning.lora_xs.r: 4000 is more than the \d+ components of .*; lower it"),
        ({"target_modules": ["embed_tokens"]}, "tuning.lora_xs.target_modules: model.embed_tokens is no linear layer"),
        ({"target_modules": ["w9"]}, "tuning.lora_xs.target_modules: 'w9'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(
    make_recipe: MakeRecipe, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        BaseModel(make_recipe(tuning={"mode": "lora_xs", "lora_xs": settings}))


@pytest.mark.parametrize("adapters", ["ffa", "fedsvd", "rolora"])
def test_parts_of_adapters_are_lora_s_alone(make_recipe: MakeRecipe, adapters: str) -> None:
    with pytest.raises(InputError, match=r"for the factors of LoRA.*choose lora or qlora"):
        make_recipe(tuning=XS, topology=ROUNDS, aggregation={"adapters": adapters})


def test_fed_sb_by_its_name_is_told_where_it_is(make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"tuning\.mode lora_xs"):
        make_recipe(topology=ROUNDS, aggregation={"adapters": "fedsb"})


def test_a_restored_engine_goes_on_as_if_never_stopped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tuning=XS, training={"max_steps": 4})
    engine = open_engine(recipe)
    engine.train(2)
    engine.checkpoint(tmp_path / "kept")
    engine.train(2)
    again = open_engine(recipe)
    again.restore(tmp_path / "kept")
    again.train(2)
    assert again.read_state().digest == engine.read_state().digest


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["adapter", "reward", "topologies", "grpo"])
def test_it_works_where_lora_does(tiny_model: Path, tmp_path: Path, cell: str) -> None:
    class Small(Family):
        def recipe(self, name: str, **sections: Any) -> Recipe:
            return super().recipe(name, **{**sections, "tuning": XS})

    WALKS[cell](Small("llama", tiny_model, tmp_path))


def test_the_gradients_of_single_records_are_had_of_its_linear_layers(xs: BaseModel) -> None:
    from core_training.engine.unit_gradients import LinearGradients

    assert LinearGradients.of(xs.model, xs.trainable_parameters) is not None
