"""What of an adapter trains and travels in a round, and the learning that published comparisons found of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, ProtocolError
from core_training.foundation.state import Manifest, TrainableState
from core_training.recipe.schema import Recipe
from strategies.adapter_sharing import Turn, fedsa, ffa, rolora, trained_part, travels, with_own
from strategies.codec_of_round import state_codec

MakeRecipe = Callable[..., Recipe]
NAMES = {"head.weight": (3,), "q.lora_A.weight": (4, 6), "q.lora_B.weight": (5, 4), "q.lora_magnitude_vector": (5,)}
MANIFEST = Manifest.of(NAMES)
EMBEDDING = Manifest.of({"wte.lora_embedding_A": (4, 9), "wte.lora_embedding_B": (5, 4)})


@pytest.fixture
def shared(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(adapters: str, codec: str = "fp32", **lora: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": 4, "local_steps": 1},
            aggregation={"adapters": adapters},
            privacy={"codec": codec},
            tuning={"lora": {"r": 4, "lora_alpha": 8, **lora}},
        )

    return make


def state_of(seed: int, manifest: Manifest = MANIFEST) -> TrainableState:
    values = np.random.default_rng(seed).standard_normal(manifest.size)
    return TrainableState(manifest, values.astype(np.float32))


@pytest.mark.parametrize(
    ("adapters", "number", "factor"),
    [("ffa", 1, "B"), ("ffa", 0, "B"), ("rolora", 3, "B"), ("rolora", 4, "A"), ("fedsa", 4, "A")],
)
def test_what_is_no_factor_always_travels_and_of_the_factors_the_one_whose_turn_it_is(
    shared: MakeRecipe, adapters: str, number: int, factor: str
) -> None:
    chosen = travels(shared(adapters), MANIFEST, number)
    assert chosen is not None
    went = [name for name, goes in zip(sorted(NAMES), chosen, strict=True) if goes]
    assert went == ["head.weight", f"q.lora_{factor}.weight", "q.lora_magnitude_vector"]


def test_where_all_travels_nothing_is_chosen(shared: MakeRecipe) -> None:
    assert travels(shared("both"), MANIFEST, 1) is None
    assert travels(shared("rolora"), MANIFEST, 0) is None, "since the start of a run both have moved"
    assert (ffa(7), rolora(1), rolora(2), fedsa(1)) == (Turn("B", "B"), Turn("B", "B"), Turn("A", "A"), Turn("AB", "A"))


def test_the_factors_of_embeddings_are_factors(shared: MakeRecipe) -> None:
    assert travels(shared("ffa"), EMBEDDING, 1) == (False, True)
    part = trained_part(shared("both", site_ranks={"small": 2}), EMBEDDING, 1, "small")
    assert part.first == {"wte.lora_embedding_A": (0, 2), "wte.lora_embedding_B": (1, 2)}


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("adapters", ["ffa", "rolora", "fedsa"])
def test_what_does_not_travel_takes_no_bytes_and_is_read_as_it_was(
    shared: MakeRecipe, adapters: str, codec: str
) -> None:
    recipe = shared(adapters, codec)
    writer, start, trained = state_codec(recipe, MANIFEST, 2), state_of(0), state_of(1)
    payload = writer.write(trained, start, bytes(16))
    read = writer.read(payload, start)
    chosen = travels(recipe, MANIFEST, 2)
    assert chosen is not None
    values = zip(chosen, read.tensors(), trained.tensors(), start.tensors(), strict=True)
    for goes, (_, got), (_, sent), (_, before) in values:
        np.testing.assert_allclose(got, sent if goes else before, rtol=0, atol=0.05 if goes and codec == "bf16" else 0)
    sizes = sum(spec.size for spec, goes in zip(MANIFEST.tensors, chosen, strict=True) if goes)
    assert len(payload) == sizes * (4 if codec == "fp32" else 2)
    with pytest.raises(ProtocolError, match=f"takes {len(payload)} bytes, not {len(payload) - 2}"):
        writer.read(payload[:-2], start)


def test_a_part_of_a_part_travels(make_recipe: MakeRecipe) -> None:
    """`privacy.keep` draws among the values of the factor whose turn it is."""
    wide = Manifest.of({"q.lora_A.weight": (8, 4000), "q.lora_B.weight": (4000, 8)})
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 4, "local_steps": 1},
        aggregation={"adapters": "rolora"},
        privacy={"codec": "bf16", "keep": 0.25},
    )
    writer, start = state_codec(recipe, wide, 1), state_of(0, wide)
    payload = writer.write(state_of(1, wide), start, bytes(16))
    assert len(payload) / 2 == pytest.approx(8000, rel=0.05)
    moved = dict(writer.read(payload, start).tensors())["q.lora_A.weight"] != dict(start.tensors())["q.lora_A.weight"]
    assert not moved.any()


def test_a_site_takes_the_common_state_with_a_factor_of_its_own(shared: MakeRecipe) -> None:
    common, own = state_of(0), state_of(1)
    merged = dict(with_own(shared("fedsa"), common, own).tensors())
    for name, values in merged.items():
        np.testing.assert_array_equal(values, dict((own if "lora_B" in name else common).tensors())[name])


def test_components_of_experts_are_refused_by_name(shared: MakeRecipe) -> None:
    experts = Manifest.of({"mlp.experts.lora_A.weight": (32, 6), "mlp.experts.lora_B.weight": (5, 32)})
    with pytest.raises(InputError, match=r"site_ranks: 'mlp.experts.lora_A.weight' holds .* several experts"):
        trained_part(shared("both", site_ranks={"small": 2}), experts, 1, "small")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"tuning": {"mode": "full"}}, "aggregation.adapters: ffa: it is for the factors of LoRA, and tuning.mode"),
        ({"aggregation": {"adapters": "ffa", "proximal_mu": 0.1}}, "proximal_mu, scaffold and feddyn move all"),
        ({"aggregation": {"adapters": "rolora", "outer": {"step": "nesterov"}}}, "aggregation.outer remembers moves"),
        ({"deepspeed": {"processes": 2}}, "leave out deepspeed"),
        (
            {"aggregation": {"adapters": "fedsa"}, "training": {"load_best_model_at_end": True}},
            "fedsa: a site cannot take its own factor back",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(make_recipe: MakeRecipe, sections: Any, said: str) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_steps": 1}
    with pytest.raises(InputError, match=said):
        make_recipe(**{"topology": topology, "aggregation": {"adapters": "ffa"}, **sections})


def test_a_rank_above_all_of_them_is_refused(shared: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"site_ranks: large: 9 is more than r: 4"):
        shared("both", site_ranks={"large": 9})


def test_rolora_goes_on_where_ffa_stalls() -> None:
    """The linear model of Chen et al. 2024: sites see y = x·(B*A*), and an A that stays as it began cannot span A*."""
    random = np.random.default_rng(0)
    rank, inputs, outputs, sites = 2, 12, 8, 4
    wanted = random.standard_normal((outputs, rank)) @ random.standard_normal((rank, inputs))
    data = [random.standard_normal((200, inputs)) for _ in range(sites)]
    first = random.standard_normal((rank, inputs)) / np.sqrt(inputs)

    def loss_after(turns: Callable[[int], Turn]) -> float:
        a, b = first.copy(), np.zeros((outputs, rank))
        for number in range(1, 401):
            turn, sums = turns(number), [np.zeros_like(a), np.zeros_like(b)]
            for x in data:
                own_a, own_b = a.copy(), b.copy()
                for _ in range(5):
                    gradient = (own_b @ own_a - wanted) @ (x.T @ x) / len(x)
                    step_a, step_b = own_b.T @ gradient, gradient @ own_a.T
                    own_a -= 0.02 * step_a * ("A" in turn.trains)
                    own_b -= 0.02 * step_b * ("B" in turn.trains)
                sums[0] += own_a / sites
                sums[1] += own_b / sites
            a, b = (new if f in turn.travels else old for f, new, old in zip("AB", sums, (a, b), strict=True))
        return float(np.square(b @ a - wanted).mean())

    assert loss_after(rolora) < 1e-3 * loss_after(ffa)
