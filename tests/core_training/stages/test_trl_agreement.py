"""The stages' losses against TRL's own trainers: same model, same tokens, the policy moved away from the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from core_training.data.examples import Example, Tokens
from core_training.data.formats import read_values
from core_training.data.records import Record
from core_training.data.rows import Collator
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.stages.base import Stage, load_stage
from core_training.stages.kto import Kto
from core_training.stages.orpo import orpo_losses
from tests.core_training.preference_data import feedback, pairs, stage_recipe

MakeRecipe = Callable[..., Recipe]
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 6,
}


def turns(record: dict[str, Any]) -> dict[str, Any]:
    """A record's texts as messages, as the stages and TRL's conversational data sets have them."""
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": value}]
        for name, value in record.items()
        if name != "label"
    } | ({"label": record["label"]} if "label" in record else {})


class Comparison:
    """A stage whose policy has left its reference, and TRL's trainer on a copy of the same models."""

    def __init__(self, make_recipe: MakeRecipe, folder: Path, stage: str, **sections: Any) -> None:
        recipe = stage_recipe(make_recipe, folder, stage, **sections)
        base = BaseModel(recipe)
        self.stage: Stage[Any] = load_stage(recipe, base)
        self.reference = copy.deepcopy(base.model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in base.model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        self.policy = copy.deepcopy(base.model)
        self.folder = str(folder)

    def examples(self, records: Sequence[dict[str, Any]]) -> list[Example]:
        made = [Record(fields, Path("made.jsonl"), 1) for fields in records]
        return [self.stage.tokenise(one, read_values(one, self.stage.recipe.stage, {})) for one in made]

    def check(self, examples: Sequence[Example], trainer: Any, inputs: dict[str, Any]) -> None:
        """Loss and the gradient of every parameter are the same."""
        batch = Collator(self.stage.base.tokenizer.pad_token_id)([(example,) for example in examples])
        if self.stage.needs_reference:
            with torch.no_grad():
                batch |= self.stage.reference(self.reference, batch)
        model = self.stage.base.model.train()
        loss = self.stage.loss(model, batch)
        ours = loss.total / loss.weight
        ours.backward()
        trainer.model.train()
        theirs = trainer.compute_loss(trainer.model, inputs)
        theirs.backward()
        assert ours.item() == pytest.approx(theirs.item(), rel=3e-6, abs=1e-5)
        gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        for name, parameter in model.named_parameters():
            # Of a large loss the least gradients are differences of large numbers.
            least = 1e-5 * max(1.0, abs(theirs.item()))
            torch.testing.assert_close(parameter.grad, gradients.pop(name), atol=least, rtol=1e-4, msg=name)
        assert not gradients


def halves(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    start = int((tokens.labels != -100).argmax())
    return tokens.input_ids[:start].tolist(), tokens.input_ids[start:].tolist()


def dataset(records: Sequence[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(records))


def test_sft(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    both = Comparison(make_recipe, tmp_path, "sft")
    records = [{"messages": r["prompt"] + r["completion"]} for r in map(turns, feedback(0, 3))]
    trainer = SFTTrainer(
        both.policy,
        SFTConfig(both.folder, assistant_only_loss=True, max_length=None, **ARGUMENTS),
        train_dataset=dataset(records),
        processing_class=both.stage.base.tokenizer,
    )
    both.check(both.examples(records), trainer, trainer.data_collator(list(trainer.train_dataset)))


def test_pretraining(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    both = Comparison(make_recipe, tmp_path, "pretrain")
    records = [{"text": f"{pair['prompt']} {pair['chosen']}"} for pair in pairs(0, 4)]
    trainer = SFTTrainer(
        both.policy,
        SFTConfig(both.folder, max_length=None, **ARGUMENTS),
        train_dataset=dataset(records),
        processing_class=both.stage.base.tokenizer,
    )
    both.check(both.examples(records), trainer, trainer.data_collator(list(trainer.train_dataset)))


def test_reward(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    both = Comparison(make_recipe, tmp_path, "reward", reward={"center_rewards_coefficient": 0.2})
    records = [{**turns(pair), "margin": 0.1 * i} for i, pair in enumerate(pairs(0, 6))]
    trainer = RewardTrainer(
        both.policy,
        RewardConfig(both.folder, center_rewards_coefficient=0.2, max_length=None, **ARGUMENTS),
        train_dataset=dataset(records),
        processing_class=both.stage.base.tokenizer,
    )
    both.check(both.examples(records), trainer, trainer.data_collator(list(trainer.train_dataset)))


def test_dpo(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    both = Comparison(make_recipe, tmp_path, "dpo", dpo={"beta": 0.25})
    records = [turns(pair) for pair in pairs(0, 6)]
    trainer = DPOTrainer(
        both.policy,
        both.reference,
        DPOConfig(both.folder, beta=0.25, max_length=None, **ARGUMENTS),
        train_dataset=dataset(records),
        processing_class=both.stage.base.tokenizer,
    )
    both.check(both.examples(records), trainer, trainer.data_collator(list(trainer.train_dataset)))


def test_kto(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """TRL pairs a prompt with its batch's previous answer, whoever's; it is given the stage's own pairs here."""
    from trl import KTOConfig, KTOTrainer

    settings = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    both = Comparison(make_recipe, tmp_path, "kto", kto=settings)
    assert isinstance(both.stage, Kto)
    records = [turns(answer) for answer in feedback(0, 3)]
    trainer = KTOTrainer(
        both.policy,
        both.reference,
        KTOConfig(both.folder, max_length=None, **settings, **ARGUMENTS),
        train_dataset=dataset(records),
        processing_class=both.stage.base.tokenizer,
    )
    examples = [row[0] for row in both.stage.arrange([(example,) for example in both.examples(records)])]
    features = [
        {**row, "KL_completion_ids": halves(example.sequences[1])[1]}
        for row, example in zip(trainer.train_dataset, examples, strict=True)
    ]
    both.check(examples, trainer, trainer.data_collator(features))
    assert trainer._metrics["train"]["kl"][0] > 0


def pair_features(example: Example) -> dict[str, Any]:
    """A pair as the collator of TRL's experimental trainers wants it."""
    features: dict[str, Any] = {"prompt_input_ids": halves(example.sequences[0])[0]}
    for name, tokens in zip(("chosen", "rejected"), example.sequences, strict=True):
        features[f"{name}_input_ids"] = tokens.input_ids.tolist()
        features[f"{name}_attention_mask"] = [1] * len(tokens)
        features[f"{name}_labels"] = tokens.labels.tolist()
    features["prompt_attention_mask"] = [1] * len(features["prompt_input_ids"])
    return features


def test_simpo(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    both = Comparison(make_recipe, tmp_path, "simpo", simpo={"beta": 2.2, "gamma": 0.9})
    arguments = CPOConfig(
        both.folder, loss_type="simpo", cpo_alpha=0.0, beta=2.2, simpo_gamma=0.9, max_length=128, **ARGUMENTS
    )
    trainer = CPOTrainer(
        both.policy, arguments, train_dataset=dataset(pairs(0, 6)), processing_class=both.stage.base.tokenizer
    )
    examples = both.examples([turns(pair) for pair in pairs(0, 6)])
    both.check(examples, trainer, trainer.data_collator([pair_features(example) for example in examples]))


def test_orpo(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """TRL's likelihood term is over prompt and answer, a mean over a batch's tokens; the paper's is over the answer.

    They coincide for one pair whose prompt is one token. On other batches the odds-ratio term is compared.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    both = Comparison(make_recipe, tmp_path, "orpo", orpo={"beta": 0.4})
    trainer = ORPOTrainer(
        both.policy,
        ORPOConfig(both.folder, beta=0.4, max_length=128, **ARGUMENTS),
        train_dataset=dataset(pairs(0, 6)),
        processing_class=both.stage.base.tokenizer,
    )
    (pair,) = both.examples([turns(pairs(0, 1)[0])])
    bare = Example(tuple(tokens.part(len(halves(tokens)[0]) - 1, len(tokens)) for tokens in pair.sequences))
    both.check([bare], trainer, trainer.data_collator([pair_features(bare)]))

    chosen, rejected = -torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) * 8
    theirs = trainer.odds_ratio_loss(chosen, rejected)[0]
    torch.testing.assert_close(orpo_losses(chosen, rejected, 0.4), -chosen - theirs, atol=1e-5, rtol=1e-5)
