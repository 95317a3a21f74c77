"""What adapters and four bits reach, in families whose layers are not plain linear ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.probe import logits_of
from core_training.recipe.schema import Recipe
from core_training.tuning import reach
from core_training.tuning.text_part import is_of_text
from tests.families.building import make_family

MakeRecipe = Callable[..., Recipe]
Build = Callable[..., BaseModel]


@pytest.fixture
def build(make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> Build:
    """A family's model, tuned as a recipe's section says."""

    def built(
        family: str,
        mode: str = "lora",
        settings: dict[str, Any] | None = None,
        tuning: dict[str, Any] | None = None,
        **lora: Any,
    ) -> BaseModel:
        folder = tmp_path / family
        if not folder.exists():
            make_family(family, tiny_model, folder, **(settings or {}))
        tuning = tuning or {"mode": mode, "lora": {"r": 4, **lora}}
        return BaseModel(make_recipe(model={"name_or_path": str(folder)}, tuning=tuning))

    return built


def trained(base: BaseModel) -> str:
    return " ".join(base.trainable_parameters)


@pytest.mark.parametrize("family", ["phimoe", "llama4_text", "falcon"])
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_layers_that_are_linear_by_name_alone_are_left_alone(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, family: str, mode: str
) -> None:
    """Routers give scores and choices at once; Falcon's layers are plain ones with a forward of their own."""
    model = make_family(family, tiny_model, tmp_path / family)
    engine = open_engine(make_recipe(model={"name_or_path": str(model)}, tuning={"mode": mode, "lora": {"r": 4}}))
    assert engine.train(2).steps == 2
    assert "router" not in trained(engine._base)
    engine.close()


@pytest.mark.parametrize("family", ["dbrx", "afmoe", "jetmoe", "zaya", "hunyuan_v1_moe"])
def test_routers_that_are_made_of_plain_layers_are_left_alone(build: Build, family: str) -> None:
    """What chooses experts is neither trained nor rounded to four bits."""
    held = build(family, "qlora")
    assert held.trainable_parameters
    assert not re.search(r"\.(router|gate)\.", trained(held))
    routers = {n: p for n, p in held.model.named_parameters() if re.search(r"\.(router|gate)\..*weight$", n)}
    assert routers
    assert all(parameter.dtype == torch.float32 for parameter in routers.values())


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_layers_of_other_classes_are_held_in_four_bits(build: Build, family: str) -> None:
    from bitsandbytes.nn import Linear4bit

    plain, held = build(family), build(family, "qlora")
    quantised = [name for name, module in held.model.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 8  # four in each of two layers
    resembles(plain, held)


def resembles(plain: BaseModel, held: BaseModel) -> None:
    exact, coarse = logits_of(plain.model), logits_of(held.model)
    assert 0 < float((coarse - exact).abs().max()) < 0.5 * float(exact.abs().max())
    assert torch.corrcoef(torch.stack([exact.flatten(), coarse.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "granitemoehybrid"])
def test_experts_are_adapted_and_held_in_four_bits(build: Build, family: str, caplog: pytest.LogCaptureFixture) -> None:
    """And the dense layers beside them, whose names PEFT takes for an expert's."""
    reach._tell.cache_clear()
    plain, held = build(family), build(family, "qlora")
    for base in (plain, held):
        assert "experts.lora_A" in trained(base)
        assert "experts.base_layer.lora_A" in trained(base)
    if family == "deepseek_v3":
        assert "layers.0.mlp.gate_proj.lora_A" in trained(plain)
        assert "layers.1.mlp.shared_experts.down_proj.lora_A" in trained(plain)
    wide = {n: p.numel() for n, p in held.model.named_parameters() if p.dtype != torch.uint8 and "lora_" not in n}
    layers = {name: size for name, size in wide.items() if "layers" in name and "norm" not in name}
    packed = sum(p.numel() for p in held.model.parameters() if p.dtype == torch.uint8)
    assert sum(layers.values()) < 0.2 * 2 * packed, layers
    resembles(plain, held)
    assert "adapters reach" not in caplog.text or family == "granitemoehybrid"


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_every_adapter_on_four_bits_has_its_part(build: Build, family: str) -> None:
    """Those of a layer's experts lie inside one another."""
    base = build(family, "qlora")
    factors = {name: p for name, p in base.model.named_parameters() if "lora_B" in name}
    tokens = torch.arange(24)[None]
    base.model.train()
    base.model(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in factors.values())
    plain = logits_of(base.model)
    for parameter in factors.values():
        parameter.data.fill_(0.05)
        assert not torch.equal(logits_of(base.model), plain)
        parameter.data.zero_()
    assert torch.equal(logits_of(base.model), plain)


def test_modules_that_are_trained_whole_have_no_adapters_inside(build: Build) -> None:
    names = trained(build("mixtral", modules_to_save=["experts"]))
    assert "experts.gate_up_proj" in names
    assert "experts.lora_A" not in names
    assert "q_proj.lora_A" in names
    with pytest.raises(InputError, match=r"tuning.lora.experts: it is false, and .* names .*gate_up_proj"):
        build("mixtral", target_modules=["q_proj", "gate_up_proj"], experts=False)


def test_what_adapters_do_not_reach_is_told_once(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    reach._tell.cache_clear()
    for _ in range(2):
        build("llama4_text", experts=False)
    assert caplog.text.count("tuning.lora: adapters reach ") == 1
    assert "of the layers' weights; left out: model.layers.*.feed_forward.experts.gate_up_proj (" in caplog.text
    assert "tuning.lora.experts: true puts adapters on the experts" in caplog.text
    build("llama4_text", lora_dropout=0.1)
    assert "Under tuning.lora.lora_dropout no adapters stand on experts" in caplog.text
    caplog.clear()
    build("gpt2")
    assert "adapters reach" not in caplog.text


@pytest.mark.parametrize(("key", "value"), [("lora_dropout", 0.1), ("use_dora", True), ("init_lora_weights", "pissa")])
def test_what_peft_has_no_adapters_on_experts_for_is_refused(
    make_recipe: MakeRecipe, build: Build, key: str, value: Any
) -> None:
    with pytest.raises(InputError, match=f"no adapters on experts under tuning.lora.{key}"):
        make_recipe(tuning={"lora": {"experts": True, key: value}})
    with pytest.raises(InputError, match=f"tuning.lora.{key}: PEFT has no such adapter for .*experts.down_proj"):
        build("mixtral", target_modules=["w2"], **{key: value})


def test_experts_are_named_as_they_are_and_as_they_were(build: Build) -> None:
    both = build("mixtral", target_modules=["w1", "w2", "w3"])
    assert trained(both) == trained(build("mixtral", target_modules=["gate_up_proj", "down_proj"]))
    assert "experts" not in trained(build("mixtral", target_modules=["q_proj"]))
    assert "experts" in trained(build("mixtral", target_modules=["q_proj"], experts=True))
    with pytest.raises(InputError, match=r"w1 and w3 of its experts as one tensor \(gate_up_proj\); name w3, too"):
        build("mixtral", target_modules=["w1", "w2"])
    with pytest.raises(InputError, match="'w4' does not fit this model"):
        build("mixtral", target_modules=["w4"])


@pytest.mark.parametrize(("family", "layer"), [("mamba", "out_proj"), ("jamba", "dt_proj")])
def test_a_layer_whose_weight_other_code_reads_gets_no_adapter_and_stays_wide(
    build: Build, family: str, layer: str
) -> None:
    held = build(family, "qlora")
    assert f"{layer}.lora_A" not in trained(held)
    weights = [
        p for n, p in held.model.named_parameters() if (n.endswith(f"{layer}.weight") and "mixer" in n) or "mamba" in n
    ]
    assert weights
    assert any(p.dtype == torch.float32 for p in weights)
    with pytest.raises(InputError, match=f"reads the weights of .*{layer} itself"):
        build(family, target_modules=[layer])


def test_what_sees_is_frozen_and_does_not_travel(build: Build) -> None:
    """A published model of text and images trains on text alone."""
    for mode in ("full", "freeze", "lora", "qlora"):
        names = trained(build("gemma3", mode))
        assert "language_model" in names
        assert "vision" not in names
        assert "multi_modal_projector" not in names


NAMED: list[dict[str, Any]] = [
    {"mode": "lora", "lora": {"target_modules": ["q_proj", "v_proj"]}},
    {"mode": "qlora", "lora": {"target_modules": ["self_attn.q_proj"]}},
    {"mode": "lora", "lora": {"target_modules": ["q_proj"], "modules_to_save": ["k_proj"]}},
    {"mode": "lora", "lora": {"target_modules": ["lm_head"], "modules_to_save": ["model"]}},
    {"mode": "ia3", "ia3": {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []}},
    {"mode": "vera", "vera": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
]


@pytest.mark.parametrize("tuning", NAMED)
def test_named_modules_are_those_of_the_text_part(build: Build, tuning: dict[str, Any]) -> None:
    """SigLIP's layers have the names of Gemma's."""
    base = build("gemma3", settings={"tie_word_embeddings": False}, tuning=tuning)
    assert base.trainable_parameters
    assert all(is_of_text(name) for name in base.trainable_parameters)


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        ({"lora": {"target_modules": ["q_proj", "fc1"]}}, "tuning.lora.target_modules: 'fc1' names what sees"),
        ({"lora": {"modules_to_save": ["vision_tower"]}}, "tuning.lora.modules_to_save: 'vision_tower' names what"),
        ({"mode": "ia3", "ia3": {"target_modules": ["fc1"]}}, "tuning.ia3.target_modules: 'fc1' names what sees"),
        ({"mode": "vera", "vera": {"target_modules": ["fc1"]}}, "tuning.vera.target_modules: 'fc1' names what sees"),
        (
            {"mode": "freeze", "freeze": {"extra_modules": ["multi_modal_projector"]}},
            "tuning.freeze.extra_modules: no 'multi_modal_projector'; outside its layers this model has",
        ),
    ],
)
def test_a_name_of_what_sees_alone_is_refused(build: Build, tuning: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        build("gemma3", tuning=tuning)
    said = str(caught.value).rpartition(" has ")[2].split(", ")
    assert "fc2" not in said
    assert "vision_tower" not in said
