"""How near `fedloom recipe check` comes to the memory that `fedloom train` then takes, at a billion parameters.

The model is a Llama of that size with random weights (a bfloat16 file of 2.2 GB), made on the spot and deleted at the
end. Each case is checked by the one command and trained by the other, for two steps on full rows, one after the other.
In bfloat16 only where the processor computes in it: elsewhere such a step takes many minutes.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.fresh_process import ROOT, in_fresh_process
from benchmarks.places import OUTPUT, Places
from core_training.foundation.errors import RunError

TARGET = 15.0
RECORDS = 40
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
ROWS = {
    "2 × 256": ("training.per_device_train_batch_size=2", "training.max_length=256"),
    "4 × 192": ("training.per_device_train_batch_size=4", "training.max_length=192"),
}
CASES = {
    f"{dtype}, {rows}{', checkpointing' if again else ''}": (
        f"model.dtype={dtype}",
        *ROWS[rows],
        f"training.gradient_checkpointing={str(again).lower()}",
    )
    for dtype in ("float32", "bfloat16")
    for rows, again in (("2 × 256", False), ("4 × 192", False), ("2 × 256", True))
}


def measure(places: Places) -> Figure:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT) as name:
        folder = Path(name).absolute()
        in_fresh_process(write_model, folder=str(folder / "model"), tokenizer=str(places.model))
        recipe = _write_recipe(places, folder)
        cases = {case: overrides for case, overrides in CASES.items() if _computes("bfloat16" in case)}
        for case in sorted(CASES.keys() - cases.keys()):
            print(f"memory_estimate: {case}: not measured: this processor emulates bfloat16", flush=True)
        details = {case: _compare(recipe, folder / "run", overrides) for case, overrides in cases.items()}
    return Figure(
        name="memory_estimate",
        meaning="memory of LoRA at 1.1 billion parameters: how far `recipe check` is from what is measured, at worst",
        value=max(abs(case["percent"]) for case in details.values()),
        unit="%",
        target=TARGET,
        details=details,
    )


def _computes(in_bfloat16: bool) -> bool:
    """Whether the processor computes so without an emulation."""
    known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return not in_bfloat16 or "avx512_bf16" in known or "amx_bf16" in known


def write_model(folder: str, tokenizer: str) -> None:
    """Write a Llama of random weights in bfloat16, with the tokenizer and chat template of another model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):  # to draw them as they are meant to be would take minutes
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, dtype="bfloat16"))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-0.03, 0.03)
            else:
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(tokenizer) / file, folder)


def _write_recipe(places: Places, folder: Path) -> Path:
    with gzip.open(places.sites["cdc"], "rt", encoding="utf-8") as lines:
        (folder / "records.jsonl").write_text("".join(islice(lines, RECORDS)), encoding="utf-8")
    recipe = places.recipe(
        f"model.name_or_path={folder / 'model'}",
        f"data.train={folder / 'records.jsonl'}",
        "training.max_steps=2",
        "training.packing=true",
        "training.per_device_eval_batch_size=2",
        name="central",
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return folder / "recipe.yaml"


def _compare(recipe: Path, run: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    estimate = _fedloom("recipe", "check", recipe, *overrides)["memory"]
    measured = _fedloom("train", recipe, *overrides, "--out", run)["peak_rss_bytes"]
    shutil.rmtree(run)
    percent = 100 * (estimate["peak"] / measured - 1)
    return {"percent": percent, "measured_bytes": measured, "estimate": estimate}


def _fedloom(*arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "fedloom.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise RunError(f"fedloom {arguments[0]} failed; what it wrote above says why")
    return dict(json.loads(done.stdout))
