"""A sample of families, each in some of its cells: it works, or the reason is given. `make families` asks all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError, RunError
from core_training.models.base_model import BaseModel
from core_training.models.conversation import Conversation, Sampling
from tests.families import finding
from tests.families.building import make_family
from tests.families.tokenizers import KINDS, make_tokenizer
from tests.families.walk import WALKS, Family
from tests.matrix.cells import SAMPLED

pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

SAMPLE = (
    *("llama", "llama-rope", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2"),
    *("gemma3_text", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom", "mpt", "stablelm"),
    *("olmo2", "granite", "cohere", "deepseek_v3", "gpt_oss", "smollm3", "starcoder2", "mamba2", "jamba", "glm4"),
    *("exaone4", "zamba2", "falcon_h1", "granitemoehybrid", "llama4_text", "phimoe", "camembert"),
)
ALWAYS = ("loss", "adapter")
_TURNS = [cell for cell in WALKS if cell not in ALWAYS]
_AT_A_TIME = 2
ASKED = [
    *(
        (family, cell)
        for number, family in enumerate(SAMPLE)
        for cell in (*ALWAYS, *(_TURNS[(number * _AT_A_TIME + turn) % len(_TURNS)] for turn in range(_AT_A_TIME)))
    ),
    ("gemma3", "topologies"),  # what sees has no part in what travels
]
"""Every family's cells: those of `ALWAYS`, and two others, which take turns."""

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


def test_a_model_that_cannot_write_is_refused_where_it_would_have_to(tiny_model: Path, tmp_path: Path) -> None:
    """Dory writes after one prompt, and not after two of unequal length."""
    family = Family("dory", make_family("dory", tiny_model, tmp_path / "dory"), tmp_path)
    for stage in SAMPLED:
        with pytest.raises(InputError, match="stage: a DoryForCausalLM cannot write here: transformers' generate fail"):
            open_engine(family.recipe(stage, stage=stage))
    assert Conversation(BaseModel(family.recipe("sft")), Sampling(max_tokens=2)).reply("fever?").tokens == 2


@pytest.mark.parametrize(
    ("name", "cell", "said"),
    [
        ("reformer", "loss", "a ReformerModelWithLMHead has no gradient without dropout: "),
        ("blt", "reward", r"the configuration of a BltForCausalLM does not state its width \(hidden_size\)"),
        ("mllama", "full", "tuning.mode: a MllamaForCausalLM written whole would not be loaded again: .*; use lora"),
        ("mllama", "adapter", "--merge: a MllamaForCausalLM written whole .*; export the adapter"),
        ("emu3", "loss", "its weights lack 21 tensors"),
    ],
)
def test_what_a_family_cannot_do_is_refused(tmp_path: Path, tiny_model: Path, name: str, cell: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        WALKS[cell](Family(name, make_family(name, tiny_model, tmp_path / name), tmp_path))


def test_the_value_of_a_token_is_found_in_a_model_that_gives_all_of_a_rows(tiny_model: Path, tmp_path: Path) -> None:
    """Whisper's decoder does not keep to the positions that are asked for."""
    WALKS["ppo"](Family("whisper", make_family("whisper", tiny_model, tmp_path / "whisper"), tmp_path))


def test_a_refusal_is_an_input_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Callable[[Family], None]:
        def walk(_: Family) -> None:
            raise error

        return walk

    walks = {"input": failing(InputError("no")), "run": failing(RunError("halfway"))}
    monkeypatch.setattr(finding, "WALKS", walks)
    found = finding.walk_through("llama")
    assert isinstance(found, finding.Found)
    assert found.outcomes == {"input": "no", "run": "**RunError** halfway"}
