"""The rows of tokens that a recipe adds: what trains them in each tuning mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from core_training.foundation.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADDED_ROWS = "fedloom_added_rows"
"""The attribute in which embeddings remember the numbers of added tokens. It is in no file."""

_KEY = "model.add_tokens"


def rows_beside_adapters(model: PreTrainedModel, adapted: list[str], whole: list[str]) -> dict[str, list[int]]:
    """The rows that are trained beside adapters, by the names of embeddings and output layer; for PEFT.

    Modules that are trained `whole` need no rows of their own, nor does what shares their weights. Raises InputError
    for `adapted` ones, and for an output layer of which PEFT trains no rows.
    """
    rows: list[int] = getattr(model.get_input_embeddings(), ADDED_ROWS, [])
    if not rows:
        return {}
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {name: module for name, module in model.named_modules() if module is embeddings or module is output}
    if both := sorted(tables.keys() & set(adapted)):
        raise InputError(
            f"{_KEY}: rows of {both[0]} cannot be trained beside an adapter on it; leave it out of "
            "tuning.lora.target_modules, or name it in tuning.lora.modules_to_save instead"
        )
    shared = output is not None and output.weight is embeddings.weight
    if shared and tables.keys() & set(whole):
        return {}
    chosen = {name: rows for name in tables if name not in whole}
    for name in chosen:
        if tables[name] is output and (type(output) is not nn.Linear or output.bias is not None):
            raise InputError(
                f"{_KEY}: rows of {name} cannot be trained by themselves ({type(output).__name__} with a bias, or of a "
                "kind of its own); name it in tuning.lora.modules_to_save"
            )
    return chosen


def check_rows_are_trained(model: PreTrainedModel) -> None:
    """Raise InputError where added tokens would stay what they are, as in layers that are frozen."""
    if not getattr(model.get_input_embeddings(), ADDED_ROWS, []):
        return
    frozen = {
        name
        for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
        and not any(parameter.requires_grad for parameter in module.parameters())
    }
    if frozen:
        raise InputError(
            f"{_KEY}: {' and '.join(sorted(frozen))} would not be trained, and the added tokens' rows with them; name "
            f"{'them' if len(frozen) > 1 else 'it'} in tuning.freeze.extra_modules, or take another tuning.mode"
        )
