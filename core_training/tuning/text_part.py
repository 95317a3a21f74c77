"""The part of a model that reads and writes text; what a published model has beside it sees images or hears."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_OF_OTHER_SENSES = re.compile(
    r"(?:^|[._])(?:vision|visual|image|img|audio|speech|video|multi_modal|mm|vqmodel)(?:[._]|$)"
)


def is_of_text(name: str) -> bool:
    """Whether the module or parameter of this name takes part where there is text alone."""
    return _OF_OTHER_SENSES.search(name) is None


def freeze_other_senses(model: nn.Module) -> None:
    """Leave what sees or hears as it is: records are text, and it has no part in their loss."""
    for name, parameter in model.named_parameters():
        if not is_of_text(name):
            parameter.requires_grad_(False)
