"""How many tokens a model takes is read from its configuration, whatever it calls that."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from core_training.models.context import UNLIMITED, context_length
from tests.families.building import tiny_config


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("mpt", {"max_seq_len": 96}, 96),
        ("gemma3", {}, 256),
        ("whisper", {"max_target_positions": 48, "max_source_positions": 100}, 48),
        ("rwkv", {"context_length": 64}, 64),
        ("bloom", {}, UNLIMITED),
    ],
)
def test_the_context_is_what_the_configuration_says(family: str, settings: dict[str, Any], expected: int) -> None:
    """Gemma 3's is in the configuration of its text part; of Whisper's, the decoder's own counts."""
    assert context_length(AutoModelForCausalLM.from_config(tiny_config(family, 50, **settings))) == expected
