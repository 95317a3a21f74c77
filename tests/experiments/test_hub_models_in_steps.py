"""Steps that ask a model of the hub's cache are done again when another commit of it lies there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.digests import Digester
from experiments.steps import STEP_KINDS
from tests import tiny


def fetched(hub: Path, name: str, commit: str, weights: bytes) -> None:
    """Have the cache hold a model at a commit, and its branch `main` be at it."""
    cache = hub / f"models--{name.replace('/', '--')}"
    folder = cache / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(weights)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(commit)


@pytest.mark.parametrize(
    "settings",
    [
        {"evaluate": "org/one", "metrics": ["exact_match"]},
        {"evaluate": "org/other", "against": "org/one", "metrics": ["exact_match"]},
        {"evaluate": "org/other", "reward": "org/one"},
        {"compare": ["org/one", "org/other"], "judge": "model:org/other"},
        {"compare": ["org/other", "org/third"], "judge": "model:org/one"},
    ],
    ids=["evaluate", "against", "reward", "compare", "judge"],
)
def test_another_commit_of_a_hub_model_is_another_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, object]
) -> None:
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    for name in ("org/one", "org/other", "org/third"):
        fetched(hub, name, "a" * 40, b"weights")
    questions = tiny.write_jsonl(
        tmp_path / "asked.jsonl", [{"prompt": "How many?", "completion": "two"}, {"prompt": "Why?", "completion": "so"}]
    )
    kind = STEP_KINDS[next(iter(settings))]
    step = kind("asked", {**settings, "on": str(questions)}, tmp_path / "runs" / "asked", tmp_path)

    def digest() -> str:
        return step.digest(Digester(tmp_path / "memory.json"))

    before = digest()
    assert digest() == before
    fetched(hub, "org/one", "b" * 40, b"better weights")
    assert digest() != before
