"""The engine: slices, states, checkpoints, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core_training.data.formats import read_values
from core_training.data.records import Record, read_records
from core_training.data.rows import Collator, pack
from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine, open_engine
from core_training.engine.tokenising import is_held_out
from core_training.foundation.errors import RunError
from core_training.foundation.state import TrainableState
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.stages.base import load_stage
from core_training.stages.language import labelled_logits
from tests import tiny

MakeRecipe = Callable[..., Recipe]
DROPOUT = {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_lora_starts_with_the_logits_of_the_base(make_recipe: MakeRecipe) -> None:
    full = BaseModel(make_recipe(tuning={"mode": "full"}))
    lora = BaseModel(make_recipe())
    assert torch.equal(logits_of(full.model), logits_of(lora.model))


def test_training_in_slices_equals_training_in_one_go(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(tuning=DROPOUT, training={"warmup_steps": 2, "lr_scheduler_type": "cosine", "max_steps": 9})
    whole = open_engine(recipe)
    whole.train(9)
    sliced = open_engine(recipe)
    for steps in (1, 2, 3, 3):
        sliced.evaluate()
        torch.rand(7)  # the owner's random numbers are no business of the run's
        sliced.begin_round(sliced.read_state())
        sliced.train(steps)
    assert sliced.read_state().digest == whole.read_state().digest


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_restored_run_equals_the_one_that_was_never_stopped(make_recipe: MakeRecipe, mode: str, tmp_path: Path) -> None:
    recipe = make_recipe(tuning={**DROPOUT, "mode": mode}, training={"max_steps": 12})
    engine = open_engine(recipe)
    engine.train(5)
    engine.checkpoint(tmp_path / "kept", {"note": 1})
    engine.train(7)
    again = open_engine(recipe)
    assert again.restore(tmp_path / "kept") == {"note": 1}
    assert again.step == 5
    again.train(7)
    assert again.read_state().digest == engine.read_state().digest
    engine.restore(tmp_path / "kept")  # backwards, in the engine that had gone on
    engine.train(7)
    assert again.read_state().digest == engine.read_state().digest


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_who_skipped_steps_goes_on_at_the_learning_rate_of_those_who_took_them(
    make_recipe: MakeRecipe, schedule: str, tmp_path: Path
) -> None:
    """A site that missed rounds; also when it is stopped and begins again."""
    recipe = make_recipe(training={"warmup_steps": 3, "lr_scheduler_type": schedule, "max_steps": 10})
    whole, late, again = (open_engine(recipe) for _ in range(3))
    rates = rates_of(whole, 10)
    late.skip(2)
    assert rates_of(late, 2) == rates[2:4]
    late.skip(3)
    late.checkpoint(tmp_path / "kept")
    again.restore(tmp_path / "kept")
    for engine in (late, again):
        assert rates_of(engine, 1) == rates[7:8]
        engine.skip(1)
        assert rates_of(engine, 1) == rates[9:]
    assert again.read_state().digest == late.read_state().digest
    late.reset()
    assert rates_of(late, 1) == rates[:1]


def test_steps_that_led_to_nothing_are_made_up_for_at_their_learning_rates(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Those of a void round; also when the site is stopped and begins again."""
    recipe = make_recipe(training={"warmup_steps": 3, "lr_scheduler_type": "cosine", "max_steps": 6})
    whole, made_up, again = (open_engine(recipe) for _ in range(3))
    rates = rates_of(whole, 6)
    assert rates_of(made_up, 2) == rates[:2]
    made_up.skip(-2)
    assert rates_of(made_up, 4) == rates[:4]
    made_up.checkpoint(tmp_path / "kept")
    again.restore(tmp_path / "kept")
    for engine in (made_up, again):
        assert rates_of(engine, 2) == rates[4:]
        with pytest.raises(RunError, match="1 steps were asked for"):
            engine.train(1)


def rates_of(engine: Engine, steps: int) -> list[float]:
    """The learning rates of the next steps."""
    rates: list[float] = []
    optimizer = engine._current.optimizer
    hook = optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    engine.train(steps)
    hook.remove()
    return rates


def test_two_runs_with_one_seed_give_one_digest_and_another_seed_another(make_recipe: MakeRecipe) -> None:
    digests = []
    for seed in (0, 0, 1):
        engine = open_engine(make_recipe(training={"seed": seed}))
        engine.train(3)
        digests.append(engine.read_state().digest)
    assert digests[0] == digests[1] != digests[2]


def test_engines_that_share_a_base_train_as_if_alone(make_recipe: MakeRecipe, site_files: list[Path]) -> None:
    recipes = [make_recipe(tuning=DROPOUT, data={"train": str(path)}) for path in site_files[:2]]
    alone = []
    for recipe in recipes:
        engine = open_engine(recipe)
        engine.train(6)
        alone.append(engine.read_state().digest)
    base = BaseModel(recipes[0])
    stages = [load_stage(recipe, base) for recipe in recipes]
    together = [Engine(stage, load_dataset(stage.recipe, stage)) for stage in stages]
    for _ in range(3):
        for engine in together:
            engine.train(2)
    assert [engine.read_state().digest for engine in together] == alone


def test_exactly_the_adapters_change(make_recipe: MakeRecipe) -> None:
    engine = open_engine(make_recipe())
    before = {name: p.detach().clone() for name, p in engine._base.model.named_parameters()}
    engine.train(2)
    for name, parameter in engine._base.model.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora_" in name), name


@pytest.mark.parametrize(("mode", "learning_rate", "falls_to"), [("full", 1e-2, 0.6), ("lora", 5e-2, 0.97)])
def test_loss_falls_on_memorised_data(
    make_recipe: MakeRecipe, mode: str, learning_rate: float, falls_to: float
) -> None:
    """Adapters alone learn slowly here: the base below them is random."""
    engine = open_engine(make_recipe(tuning={"mode": mode}, training={"max_steps": 40, "learning_rate": learning_rate}))
    report = engine.train(40)
    assert report.loss_last < falls_to * report.loss_first


def test_first_loss_is_the_independent_cross_entropy_of_the_first_batch(make_recipe: MakeRecipe) -> None:
    """Loss over the answers' tokens only, from whole logits, in a few lines that share no code with the stage."""
    recipe = make_recipe(training={"per_device_train_batch_size": 64}, tuning={"mode": "full"})
    stage = tiny.stage_of(recipe)
    dataset = load_dataset(recipe, stage)
    total, count = 0.0, 0
    for ((example,),) in zip(dataset.rows, strict=True):
        (tokens,) = example.sequences
        ids, labels = torch.tensor(tokens.input_ids)[None], torch.tensor(tokens.labels)
        with torch.no_grad():
            log_probabilities = stage.base.model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(1, len(labels)):
            if labels[position] != -100:
                total -= float(log_probabilities[position - 1, labels[position]])
                count += 1
    report = Engine(stage, dataset).train(1)
    assert (report.weight, report.tokens) == (count, count)
    assert report.loss_first == pytest.approx(total / count, abs=1e-5)


def test_gradient_accumulation_equals_one_large_batch(make_recipe: MakeRecipe) -> None:
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1}
    large = open_engine(make_recipe(training={**settings, "per_device_train_batch_size": 8}))
    small = open_engine(
        make_recipe(training={**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    )
    assert large.train(1).weight == small.train(1).weight
    np.testing.assert_allclose(large.read_state().buffer, small.read_state().buffer, atol=1e-6)


def test_packed_loss_equals_padded_loss(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    stage = tiny.stage_of(recipe)
    rows = load_dataset(recipe, stage).rows
    examples = [row[0] for row in rows]
    packed_rows = [tuple(examples[i] for i in group) for group in pack([len(example) for example in examples], 100)]
    assert len(packed_rows) < len(examples)
    losses = []
    model = stage.base.model.eval()
    for batch in (Collator(0)(packed_rows), Collator(0)(rows)):
        with torch.no_grad():
            logits, labels = labelled_logits(model, batch)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100))
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-6)


def test_packing_uses_every_example_once_and_never_overfills() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 50, 200).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


@pytest.mark.parametrize("sites", [1, 2, 3])
def test_no_held_out_record_is_trained_on_at_any_site_count(
    make_recipe: MakeRecipe, site_files: list[Path], sites: int
) -> None:
    """The same records are held out however the data are divided, and a copy at another site is held out too."""
    recipe = make_recipe()
    records = [record for path in site_files for record in read_records(path)]
    records += [Record({**r.fields, "id": "copy"}, Path("elsewhere.jsonl"), r.line) for r in records[:20]]
    values = [read_values(record, recipe.stage, recipe.data.columns).identity for record in records]
    held_out = [is_held_out(value, 0.2) for value in values]
    assert held_out[: len(records) - 20][:20] == held_out[-20:]
    stage = tiny.stage_of(recipe)
    trained, evaluated = set(), set()
    for part in range(sites):
        dataset = load_dataset(recipe, stage, records[part::sites])
        trained |= {tiny.token_ids(row) for row in dataset.rows}
        evaluated |= {tiny.token_ids(row) for rows in dataset.evaluation.values() for row in rows}
    assert evaluated
    assert not trained & evaluated
    assert len(trained) + len(evaluated) == len({tuple(raw.values()) for raw in values})


def test_saved_adapter_loads_in_peft_with_the_same_logits_and_merges(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = make_recipe()
    engine = open_engine(recipe)
    engine.train(6)
    engine.save_model(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = logits_of(engine._base.model)
    assert torch.equal(logits_of(loaded), expected)
    assert torch.allclose(logits_of(loaded.merge_and_unload()), expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template


def test_saved_model_loads_in_transformers_with_the_same_logits(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = open_engine(make_recipe(tuning={"mode": "full"}))
    engine.train(3)
    engine.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(engine._base.model))


def test_a_loss_that_is_not_finite_ends_the_run(make_recipe: MakeRecipe) -> None:
    engine = open_engine(make_recipe())
    state = engine.read_state()
    engine.begin_round(TrainableState(state.manifest, np.full_like(state.buffer, np.inf)))
    with pytest.raises(RunError, match="no longer finite"):
        engine.train(1)


def test_pretraining_learns_from_every_token_and_splits_long_texts(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"fever and cough of ward {i} " * 12 for i in range(20)))
    recipe = make_recipe(
        stage="pretrain", tuning={"mode": "full"}, data={"train": str(text), "columns": {}}, training={"max_steps": 20}
    )
    stage = tiny.stage_of(recipe)
    dataset = load_dataset(recipe, stage)
    tokenizer = stage.base.tokenizer
    assert all(len(tiny.token_ids(row)) <= 64 for row in dataset.rows)
    tokens = sum(len(tokenizer(r.fields["text"])["input_ids"]) + 1 for r in read_records(text))
    held_out = sum(len(tiny.token_ids(row)) for rows in dataset.evaluation.values() for row in rows)
    assert sum(len(tiny.token_ids(row)) for row in dataset.rows) + held_out == pytest.approx(tokens, abs=20)
    report = Engine(stage, dataset).train(20)
    assert report.loss_first == pytest.approx(np.log(len(tokenizer)), rel=0.05)  # ln V at random weights
    assert report.loss_last < report.loss_first
