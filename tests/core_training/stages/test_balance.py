"""The loss that keeps experts in balance is transformers' own, over the tokens that are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core_training.data.rows import Collator
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.models.heads import last_labelled
from core_training.recipe.schema import Recipe
from core_training.stages.balance import balance_loss
from tests.families.building import make_family

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "jamba"])
def test_it_is_the_models_own(make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path, family: str) -> None:
    folder = str(make_family(family, tiny_model, tmp_path / family))
    recipes = [
        make_recipe(model={"name_or_path": folder, "router_aux_loss_coef": coef}, tuning={"mode": "full"})
        for coef in (0.5, 0.0)
    ]
    balanced, plain = map(open_engine, recipes)
    batch = Collator(0)([plain._rows[number] for number in range(3)])
    model = balanced._base.model.train()
    loss, alone = (engine._stage.loss(model, batch) for engine in (balanced, plain))
    read = torch.zeros_like(batch["labels"])
    for row, labels in zip(read, batch["labels"], strict=True):
        row[: int((labels != -100).nonzero().max()) + 1] = 1
    theirs = model(input_ids=batch["input_ids"], attention_mask=read, output_router_logits=True).aux_loss
    added = (loss.total - alone.total) / loss.weight
    assert float(added.detach()) == pytest.approx(0.5 * float(theirs.detach()), rel=1e-4)
    added.backward()
    routers = [p for n, p in model.named_parameters() if "router" in n or n.endswith("gate.weight")]
    assert any(p.grad is not None and bool(p.grad.any()) for p in routers)
    assert balanced.train(2).steps == 2


def test_a_router_that_gives_probabilities_is_kept_in_balance(
    make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    """Gemma 4's does, and transformers has no such loss of it: it is counted here."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    folder = make_family("gemma4_text", tiny_model, tmp_path / "gemma4", **experts)
    engine = open_engine(make_recipe(model={"name_or_path": str(folder), "router_aux_loss_coef": 0.5}))
    batch = Collator(0)([engine._rows[number] for number in range(3)])
    read = torch.arange(batch["labels"].shape[1]) <= last_labelled(batch["labels"]).unsqueeze(1)
    probabilities = list[torch.Tensor]()
    model = engine._base.model.eval()
    for module in model.modules():
        if type(module).__name__ == "Gemma4TextRouter":
            module.register_forward_hook(lambda _m, _i, output: probabilities.append(output[0].detach()))
    output = model(input_ids=batch["input_ids"], output_router_logits=True, use_cache=False)
    of_read = torch.cat([layer[read.flatten()] for layer in probabilities])
    chosen = torch.zeros_like(of_read).scatter(1, of_read.topk(2).indices, 1.0)
    expected = 4 * (chosen.mean(dim=0) * of_read.mean(dim=0)).sum()
    assert float(balance_loss(output, model.config, batch).detach()) == pytest.approx(float(expected), rel=1e-4)
    assert engine.train(2).steps == 2


def test_a_model_without_a_router_is_refused(make_recipe: MakeRecipe) -> None:
    engine = open_engine(make_recipe(model={"router_aux_loss_coef": 0.1}))
    with pytest.raises(InputError, match="router_aux_loss_coef: a llama model does not give its router's scores"):
        engine.train(1)
    with pytest.raises(
        InputError, match="router_aux_loss_coef: it is for the stages pretrain and sft, not for stage dpo"
    ):
        make_recipe(stage="dpo", model={"router_aux_loss_coef": 0.1})
