"""What the tests of tuning share: a training step written by hand, and run folders written without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.models.export import layout_files
from core_training.models.heads import innermost
from core_training.models.parameters import read_parameters, write_parameters
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import result_name, write_result

IDS = torch.arange(5, 45).reshape(2, 20)
JUDGED = {"reward_function": "judge.py:judge"}
"""Section `rollout` of recipes that are not trained here."""


def loss(base: BaseModel) -> torch.Tensor:
    """A loss to which every trained tensor contributes, once adapters are not zero."""
    output = base.model(input_ids=IDS, output_hidden_states=True, use_cache=False)
    if output.logits.shape[-1] == 1:
        return -F.logsigmoid(output.logits[0] - output.logits[1]).sum()
    total = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    if hasattr(innermost(base.model), "value_head"):
        total = total + (innermost(base.model).value_head(output.hidden_states[-1]) - 1).square().mean()
    return total


def step(base: BaseModel) -> None:
    """One optimizer step, as plainly as it can be written."""
    optimizer = torch.optim.AdamW(base.trainable_parameters.values(), lr=1e-2, weight_decay=0.0)
    base.model.train()
    base.model.zero_grad()
    loss(base).backward()
    optimizer.step()
    base.model.zero_grad()


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    """Logits or scores on fixed tokens, float32."""
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def finished(recipe: Recipe, run: Path, seed: int = 0) -> BaseModel:
    """Write the run folder of `recipe` as if it had trained to a state drawn from `seed`; returns the model with it."""
    base = BaseModel(recipe)
    noise = np.random.default_rng(seed).normal(0, 0.05, base.manifest.size).astype(np.float32)
    state = TrainableState(base.manifest, base.initial_state.buffer + noise)
    write_parameters(base.trainable_parameters, state)
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    layout = layout_files(base, recipe, recipe.model.name_or_path)
    write_result(read_parameters(base.result_parameters), layout, run / result_name(recipe), base.tokenizer)
    return base
