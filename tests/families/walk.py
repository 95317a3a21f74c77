"""What is asked of a family, one cell after the other; each gives what was found, or raises."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from core_training.data.examples import IGNORED
from core_training.engine.central import train
from core_training.engine.engine import Engine, open_engine
from core_training.foundation.state import TrainableState
from core_training.models.conversation import Conversation, Sampling
from core_training.models.loading import load_starting_model, load_tokenizer
from core_training.models.probe import logits_of
from core_training.models.results import export_adapter, export_model, find_result, load_result, load_reward_model
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from core_training.tuning.text_part import is_of_text
from simulations import simulate
from tests import tiny
from tests.core_training import preference_data
from tests.matrix.cells import JUDGE, SAMPLED

_ROUNDS = 2
_ROUTER = re.compile(r"(^|\.)(router|gate)\.")
CLOSE = 2e-4
"""How far logits may lie from each other that are computed in another order; those of these models are about one."""


@dataclass(frozen=True)
class Family:
    """A built family and the place for its runs."""

    name: str
    model: Path
    folder: Path

    def recipe(self, name: str, **sections: Any) -> Recipe:
        """A short run of a stage on its model."""
        stage = sections.pop("stage", "sft")
        files = [str(self._site(stage, number)) for number in range(2)]
        document: dict[str, Any] = {
            "model": {"name_or_path": str(self.model)},
            "stage": stage,
            "tuning": {"mode": "lora", "lora": {"r": 2, "lora_alpha": 8}, "freeze": {"trainable_layers": 1}},
            "data": {"train": files, "eval_fraction": 0.25},
            "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 48, "max_steps": 2},
            "simulation": {"sites": files},
            "output": str(self.folder / name),
        }
        if stage in SAMPLED:
            judge = self.folder / "judge.py"
            judge.write_text(JUDGE)
            document["rollout"] = {"reward_function": f"{judge}:score", "max_new_tokens": 5}
            document["training"]["max_length"] = 32
        for key, section in sections.items():
            document[key] = {**document.get(key, {}), **section} if isinstance(section, dict) else section
        return parse_recipe(yaml.safe_dump(document))

    def _site(self, stage: str, number: int) -> Path:
        path = self.folder / "records" / stage / f"site{number}.jsonl"
        if path.exists():
            return path
        if stage in SAMPLED:
            records = [{"prompt": record["question"]} for record in tiny.questions(number, 8)]
        else:
            records = preference_data.records(stage, number, 8)
        return tiny.write_jsonl(path, records)

    def run(self, recipe: Recipe) -> tuple[Path, torch.Tensor]:
        """Train; returns the run folder, and the logits of the model in memory."""
        folder = RunFolder(Path(recipe.output))
        folder.prepare(recipe, resume=False)
        engine = open_engine(recipe)
        start = logits_of(engine._base.model)
        train(recipe, engine, folder)
        logits = logits_of(engine._base.model)
        assert logits.isfinite().all()
        assert (logits - start).abs().max() > 1e-5, "training changed nothing"
        engine.close()
        return folder.path, logits


def first_loss(family: Family) -> None:
    """The loss before the first step is the one that plain transformers has of the same tokens, packed or not."""
    engine = open_engine(family.recipe("loss", training={"packing": False}))
    plain = AutoModelForCausalLM.from_pretrained(family.model).eval().requires_grad_(requires_grad=False)
    total, count = 0.0, 0
    for rows in engine._evaluation.values():
        for row in rows:
            (tokens,) = row[0].sequences
            ids, labels = (torch.tensor(array[None]) for array in (tokens.input_ids, tokens.labels))
            logits = plain(input_ids=ids.long(), use_cache=False).logits[:, :-1].float()
            wanted = labels[:, 1:].long()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
            )
            count += int((wanted != IGNORED).sum())
    expected = total / count
    assert math.isclose(_loss(engine), expected, rel_tol=1e-4), (_loss(engine), expected)
    packed = open_engine(family.recipe("packed"))
    if packed._base.keeps_examples_apart:
        by_itself, together = (_training_loss(one) for one in (engine, packed))
        assert math.isclose(by_itself, together, rel_tol=1e-4), (by_itself, together)
    for one in (engine, packed):
        one.close()


def _loss(engine: Engine) -> float:
    reports = engine.evaluate().values()
    return sum(report.loss_sum for report in reports) / sum(report.weight for report in reports)


def _training_loss(engine: Engine) -> float:
    """The mean loss on all training rows, as they are arranged."""
    engine._take_model()
    prepared = engine._current.prepared
    prepared.model.eval()
    report = engine._stage.evaluate(prepared, engine._rows)
    return report.loss_sum / report.weight


def adapter(family: Family) -> None:
    """An adapter by itself, merged, and as the start of the next run, says what the run's model said."""
    run, logits = family.run(family.recipe("lora"))
    result = find_result(run)
    _near(load_result(result).model, logits)
    export_model(result, family.folder / "merged")
    _near(AutoModelForCausalLM.from_pretrained(family.folder / "merged"), logits)
    following = family.recipe("next", model={"adapters": [str(run)]})
    _near(load_starting_model(following, load_tokenizer(following)).model, logits)
    export_adapter(result, family.folder / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(family.model)
    _near(PeftModel.from_pretrained(plain, str(family.folder / "adapter")), logits)


def whole(family: Family) -> None:
    _whole(family, "full")


def freeze(family: Family) -> None:
    _whole(family, "freeze")


def _whole(family: Family, mode: str) -> None:
    """What was trained whole says the same, loaded by transformers."""
    run, logits = family.run(family.recipe(mode, tuning={"mode": mode}))
    _near(AutoModelForCausalLM.from_pretrained(run / "model"), logits)


def qlora(family: Family) -> None:
    """Adapters on four bits train, and are found again."""
    run, logits = family.run(family.recipe("qlora", tuning={"mode": "qlora"}))
    _near(load_result(find_result(run)).model, logits)


def reward(family: Family) -> None:
    """A reward model judges as it did in training."""
    run, logits = family.run(family.recipe("reward", stage="reward"))
    _near(load_reward_model(run, load_result(find_result(run)).vocabulary_digest), logits)


def _stage(stage: str) -> Callable[[Family], None]:
    def walk(family: Family) -> None:
        family.run(family.recipe(stage, stage=stage))

    walk.__doc__ = f"Stage {stage} takes steps, and they change what the model says."
    return walk


def topologies(family: Family) -> None:
    """Two sites over a server and two nodes by gossip end with the mean of what each trains; no router is trained."""
    sites = [str(family._site("sft", number)) for number in range(2)]

    def recipe(kind: str, name: str, records: list[str]) -> Recipe:
        topology = {"kind": kind, "rounds": _ROUNDS, "local_steps": 1}
        return family.recipe(
            name, topology=topology, simulation={"sites": sites}, data={"train": records, "eval_fraction": 0.25}
        )

    engines = [open_engine(recipe("federated", f"site{number}", [site])) for number, site in enumerate(sites)]
    names = list(engines[0]._base.trainable_parameters)
    assert all(is_of_text(name) and not _ROUTER.search(name) for name in names), names
    state = engines[0].initial_state
    for _ in range(_ROUNDS):
        total, weight = np.zeros(state.manifest.size), 0.0
        for engine in engines:
            engine.begin_round(state)
            report = engine.train(1)
            total += report.weight * engine.read_state().buffer.astype(np.float64)
            weight += report.weight
        state = TrainableState(state.manifest, (total / weight).astype(np.float32))
    assert state.digest != engines[0].initial_state.digest
    for engine in engines:
        engine.close()
    for kind in ("federated", "gossip"):
        together = recipe(kind, kind, sites)
        assert simulate(together, RunFolder(Path(together.output))).state_digest == state.digest, kind


def chat(family: Family) -> None:
    """A model that has learnt one answer gives it, and ends."""
    said = {"prompt": "fever?", "completion": "See the ward."}
    data = tiny.write_jsonl(family.folder / "said.jsonl", [said] * 8)
    recipe = family.recipe(
        "chat",
        tuning={"mode": "full"},
        data={"train": str(data), "eval_fraction": 0.0},
        training={"max_steps": 60, "learning_rate": 1e-2, "packing": False, "max_grad_norm": 1.0},
    )
    engine = open_engine(recipe)
    report = engine.train(60)
    engine._base.model.eval()
    engine._base.model.config.use_cache = True
    answer = Conversation(engine._base, Sampling(max_tokens=40)).reply("fever?")
    assert report.loss_last < report.loss_first / 2, report
    assert answer.ended, answer
    engine.close()


WALKS: dict[str, Callable[[Family], None]] = {
    "loss": first_loss,
    "adapter": adapter,
    "full": whole,
    "freeze": freeze,
    "qlora": qlora,
    "reward": reward,
    **{stage: _stage(stage) for stage in ("pretrain", "dpo", "kto", "orpo", "simpo", "ppo", "rloo", "grpo")},
    "topologies": topologies,
    "chat": chat,
}
"""The cells of a family, by name."""


def _near(model: Any, logits: torch.Tensor) -> None:
    difference = float((logits_of(model.eval()) - logits).abs().max())
    assert difference < CLOSE * (1 + float(logits.abs().max())), f"logits differ by {difference:.2g}"
