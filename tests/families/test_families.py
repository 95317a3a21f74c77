"""A sample of families, each in some of its cells: it works, or the reason is given. `make families` asks all."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError
from tests.families.building import make_family
from tests.families.tokenizers import KINDS, make_tokenizer
from tests.families.walk import WALKS, Family

pytestmark = pytest.mark.slow

SAMPLE = (
    *("llama", "llama-rope", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom", "mpt", "stablelm"),
    *("olmo2", "granite", "cohere", "deepseek_v3", "gpt_oss", "smollm3", "starcoder2", "mamba2", "jamba", "glm4"),
    *("exaone4", "zamba2", "falcon_h1", "granitemoehybrid", "llama4_text", "phimoe", "camembert"),
)
ALWAYS = ("loss", "adapter")
_TURNS = [cell for cell in WALKS if cell not in ALWAYS]
_AT_A_TIME = 4
ASKED = [
    (family, cell)
    for number, family in enumerate(SAMPLE)
    for cell in (*ALWAYS, *(_TURNS[(number * _AT_A_TIME + turn) % len(_TURNS)] for turn in range(_AT_A_TIME)))
]
"""Every family's cells: those of `ALWAYS`, and four others, which take turns."""

REFUSED = {"camembert": "reads ahead, as encoders do"}
"""Families of the sample that are refused, with the reason."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The families that were built so far, by name."""
    return {}


@pytest.mark.parametrize(("family", "cell"), ASKED)
def test_a_family(
    built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, family: str, cell: str
) -> None:
    if family not in built:
        folder = tmp_path_factory.mktemp("family")
        kind = list(KINDS)[len(built) % len(KINDS)]
        built[family] = make_family(family, make_tokenizer(kind, folder / kind), folder / family)
    refusal = pytest.raises(InputError, match=REFUSED[family]) if family in REFUSED else nullcontext()
    with refusal:
        WALKS[cell](Family(family, built[family], tmp_path))
