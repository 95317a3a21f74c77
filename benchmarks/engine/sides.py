"""Both sides of a comparison, on one model and one file of records: our engine, and TRL's trainers.

What is not given stays at each side's default. Tokens are those of the examples after the cut, prompts included and
padding not, so that both sides have the same ones in an epoch; where a stage samples answers, they are the answers'.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine
from core_training.foundation.environment import silence_libraries
from core_training.models.base_model import BaseModel
from core_training.parts.tuning_modes.lora import Lora
from core_training.recipe.reading import parse_recipe
from core_training.stages.base import load_stage

LIBRARIES = {
    "ours": ("core_training.engine.engine", "transformers.models.llama.modeling_llama", "peft.peft_model"),
    "trl": (
        "trl.trainer.sft_trainer",
        "trl.trainer.dpo_trainer",
        "transformers.models.llama.modeling_llama",
        "peft.peft_model",
        "datasets",
    ),
}
"""The modules that each side imports in any case."""


@dataclass(frozen=True)
class Epoch:
    """A pass over the records."""

    seconds: float
    tokens: int


class Ours:
    """Our engine on a recipe of so many epochs, given as its sections."""

    def __init__(self, sections: dict[str, Any], epochs: int) -> None:
        data = {"eval_fraction": 0.0, **sections["data"]}
        training = {**sections.get("training", {}), "num_train_epochs": float(epochs)}
        recipe = parse_recipe(json.dumps({**sections, "data": data, "training": training}))
        stage = load_stage(recipe, BaseModel(recipe))
        dataset = load_dataset(recipe, stage)
        self.tokens = sum(len(example) for row in dataset.rows for example in row)
        """Tokens of the records."""
        self._samples = recipe.stage_part.samples
        self.engine = Engine(stage, dataset)
        with _reference_passes() as seconds:
            self.engine.launch()
        self.reference_seconds = sum(seconds)
        """The time of the reference policy's one pass over the records, if there is one."""
        self._steps = self.engine.total_steps // epochs

    def train_epoch(self) -> Epoch:
        """Train an epoch. It is charged with a pass of the reference policy, which is made once a run."""
        began = time.perf_counter()
        report = self.engine.train(self._steps)
        seconds = _seconds_since(began) + self.reference_seconds
        return Epoch(seconds, report.tokens if self._samples else self.tokens)


class Trl:
    """TRL's trainer of a stage on the same file, with LoRA of our default rank on all linear layers."""

    def __init__(self, model: str, file: str, stage: str, epochs: int, judge: Any = None, **arguments: Any) -> None:
        """`judge` is the reward function where answers are sampled; `arguments` are the trainer's configuration's."""
        import trl
        from datasets import Dataset
        from peft import LoraConfig

        silence_libraries()
        config, trainer = {
            "sft": (trl.SFTConfig, trl.SFTTrainer),
            "dpo": (trl.DPOConfig, trl.DPOTrainer),
            "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        }[stage]
        lora = Lora()
        records = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
        with tempfile.TemporaryDirectory() as output:
            self._trainer = trainer(
                model=model,
                args=config(
                    output_dir=output,
                    num_train_epochs=epochs,
                    use_cpu=not torch.cuda.is_available(),
                    save_strategy="no",
                    logging_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    **arguments,
                ),
                train_dataset=Dataset.from_list(records),
                peft_config=LoraConfig(
                    r=lora.r, lora_alpha=lora.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
                **({} if judge is None else {"reward_funcs": judge}),
            )
        self._samples = stage == "grpo"
        self._longest = arguments.get("max_length")
        self.tokens = 0 if self._samples else sum(map(self._tokens_of, self._trainer.train_dataset))

    def train(self, before_each_epoch: Callable[[], None] = lambda: None) -> list[Epoch]:
        """Train all epochs."""
        from transformers import TrainerCallback

        began, epochs = 0.0, list[Epoch]()
        trl = self

        class Stopwatch(TrainerCallback):  # type: ignore[misc]
            def on_epoch_begin(self, *_: Any, **__: Any) -> None:
                nonlocal began
                before_each_epoch()
                began = time.perf_counter()

            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                seconds = _seconds_since(began)
                answered = trl._answered() - sum(epoch.tokens for epoch in epochs)
                epochs.append(Epoch(seconds, answered if trl._samples else trl.tokens))

        self._trainer.add_callback(Stopwatch())
        self._trainer.train()
        return epochs

    def _answered(self) -> int:
        """Tokens of all answers that were sampled so far; without logging, the trainer keeps each batch's mean."""
        if not self._samples:
            return 0
        lengths = self._trainer._metrics["train"]["completions/mean_length"]
        return round(sum(lengths) * self._trainer.args.per_device_train_batch_size)

    def _tokens_of(self, example: dict[str, Any]) -> int:
        """Tokens of an example after the cut, which for pairs is made batch by batch."""
        if "input_ids" in example:
            return len(example["input_ids"])
        prompt = len(example["prompt_ids"])
        lengths = [prompt + len(example[name]) for name in ("chosen_ids", "rejected_ids")]
        return sum(lengths if self._longest is None else (min(length, self._longest) for length in lengths))


def _seconds_since(began: float) -> float:
    """The seconds until all that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextmanager
def _reference_passes() -> Iterator[list[float]]:
    """The seconds for which the reference policy is in the parameters."""
    seconds: list[float] = []
    inner = BaseModel.reference_policy

    @contextmanager
    def timed(base: BaseModel, *arguments: Any) -> Iterator[None]:
        began = time.perf_counter()
        with inner(base, *arguments):
            yield
        seconds.append(time.perf_counter() - began)

    with patch.object(BaseModel, "reference_policy", timed):
        yield seconds
