"""A recipe is read strictly: what is wrong is named by key or line, with what would be right; nothing is guessed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core_training.foundation.errors import InputError
from core_training.recipe.reading import load_recipe, parse_recipe
from core_training.recipe.schema import Recipe

MINIMAL = "model: {name_or_path: base}\nstage: sft\n"
FEDERATED = "topology: {kind: federated, rounds: 2, local_steps: 3}\n"


def message_of(text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, source="my.yaml", overrides=list(overrides))
    assert caught.value.exit_code == 2
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def test_two_sections_make_a_recipe_and_the_rest_has_defaults() -> None:
    recipe = parse_recipe(MINIMAL)
    assert (recipe.tuning.mode, recipe.topology.kind, recipe.training.max_length) == ("lora", "central", 512)
    assert recipe.usual_learning_rate == 2e-4
    assert parse_recipe(MINIMAL + "tuning: {mode: full}").usual_learning_rate == 2e-5


def test_numbers_may_be_written_as_people_write_them() -> None:
    assert parse_recipe(MINIMAL + "training: {learning_rate: 1e-3}").training.learning_rate == 1e-3
    assert parse_recipe(MINIMAL + "training: {weight_decay: 1}").training.weight_decay == 1.0


@pytest.mark.parametrize(
    ("lines", "key", "hint"),
    [
        ("modle: {}", "modle", "did you mean 'model'?"),
        ("training: {learning_rat: 1}", "training.learning_rat", "did you mean 'learning_rate'?"),
        ("tuning: {lora: {rank: 4}}", "tuning.lora.rank", "known here: r, lora_alpha"),
        ("simulation: {site: [a]}", "simulation.site", "did you mean 'sites'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_key_that_was_meant(lines: str, key: str, hint: str) -> None:
    message = message_of(MINIMAL + lines)
    assert message.startswith(f"my.yaml: {key}: unknown key; ")
    assert hint in message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("training: {learning_rate: fast}", "training.learning_rate: input should be a valid number, not 'fast'"),
        ("training: {max_steps: 2.5}", "training.max_steps: input should be a valid integer, not 2.5"),
        ("training: {max_steps: true}", "training.max_steps: input should be a valid integer, not True"),
        ("training: {packing: 'no'}", "training.packing: input should be a valid boolean, not 'no'"),
        ("training: {learning_rate: 1e999}", "training.learning_rate: input should be a finite number, not inf"),
        ("training: {seed: 4294967296}", "training.seed: input should be less than 4294967296"),
        ("training: {max_length: 1}", "training.max_length: input should be greater than or equal to 2, not 1"),
        (
            "training: {per_device_train_batch_size: 65537}",
            "training.per_device_train_batch_size: input should be less than",
        ),
        (
            "training: {per_device_eval_batch_size: 65537}",
            "training.per_device_eval_batch_size: input should be less than",
        ),
        ("tuning: {lora: {r: 65537}}", "tuning.lora.r: input should be less than or equal to 65536, not 65537"),
        ("tuning: {vera: {r: 1000000000}}", "tuning.vera.r: input should be less than or equal to 65536"),
        ("rollout: {max_new_tokens: 1000001}", "rollout.max_new_tokens: input should be less than or equal to 1000000"),
        ("training:", "training: this is a section with keys of its own (learning_rate, "),
        ("data: {train: 3}", "data.train: input should be a valid string or a valid list, not 3"),
        ("simulation: {sites: [3]}", "simulation.sites.0: input should be a valid string, not 3"),
        (
            "tuning: {mode: lor}",
            "tuning.mode: input should be 'full', 'freeze', 'lora', 'qlora', 'ia3', 'vera' or 'lora_xs', not 'lor'",
        ),
        (
            "tuning: {lora: {target_modules: all}}",
            "tuning.lora.target_modules: input should be 'all-linear' or a valid list",
        ),
        ("output: ''", "output: string should have at least 1 character"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(lines: str, expected: str) -> None:
    message = message_of(MINIMAL + lines)
    assert message.startswith(f"my.yaml: {expected}")
    assert ";" not in message


def test_zero_local_steps_is_refused() -> None:
    message = message_of(MINIMAL + "topology: {kind: federated, rounds: 2, local_steps: 0}")
    assert "topology.local_steps: input should be greater than or equal to 1, not 0" in message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("topology: {kind: gossip, local_steps: 2}", "topology.rounds: a gossip run needs it"),
        ("deepspeed: {processes: 2, offload: all, stage: 2}", "deepspeed.offload: 'all' needs deepspeed.stage 3"),
        ("deepspeed: {processes: 2, offload: optimizer}", "deepspeed.offload: ZeRO 0 moves nothing"),
        ("simulation: {sites: [a.txt], partition: iid, count: 2}", "simulation: give either 'sites' or 'partition'"),
        ("simulation: {sites: []}", "simulation.sites: name at least one"),
        ("simulation: {partition: iid}", "simulation.count: partition 'iid' needs the number of sites"),
        ("simulation: {partition: natural}", "simulation.by: partition 'natural' needs a column"),
    ],
)
def test_an_impossible_combination_is_explained(lines: str, expected: str) -> None:
    assert message_of(MINIMAL + lines).startswith(f"my.yaml: {expected}")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("stage: kto\ntraining: {per_device_train_batch_size: 1}", "training.per_device_train_batch_size: stage kto"),
        ("stage: dpo\ntraining: {packing: true}", "training.packing: examples of stage dpo cannot share a row"),
        ("stage: dpo\ndpo: {loss_type: ipo, label_smoothing: 0.1}", "dpo.label_smoothing: loss_type ipo has none"),
        ("stage: dpo\ndpo: {loss_type: exo_pair}", "dpo.label_smoothing: loss_type exo_pair needs it: the paper's ε"),
        ("stage: dpo\ndpo: {label_smoothing: 0.5}", "dpo.label_smoothing: input should be less than 0.5"),
        ("stage: dpo\ndpo: {loss_type: aot}", "dpo.loss_type: not aot: it sorts the ratios of a batch, so the losses"),
        ("stage: dpo\ndpo: {loss_type: sft}", "dpo.loss_type: not sft: it goes beside another loss; set sft_weight"),
        ("stage: dpo\ndpo: {loss_type: slic}", "dpo.loss_type: input should be 'sigmoid', 'sigmoid_norm', 'ipo',"),
        ("stage: ppo", "rollout: stage ppo needs something that judges answers; give either reward_model"),
        ("stage: grpo\nrollout: {reward_model: a, reward_function: b.py:c}", "rollout: stage grpo needs something"),
    ],
)
def test_what_a_stage_cannot_train_with_is_named(lines: str, expected: str) -> None:
    assert expected in message_of("model: {name_or_path: base}\n" + lines)


@pytest.mark.parametrize(
    ("stage", "mode", "rate"),
    [("sft", "full", 2e-5), ("sft", "qlora", 2e-4), ("dpo", "full", 5e-7), ("dpo", "lora", 5e-6)],
)
def test_the_usual_learning_rate_is_that_of_stage_and_mode(stage: str, mode: str, rate: float) -> None:
    text = f"model: {{name_or_path: base}}\nstage: {stage}\ntuning: {{mode: {mode}}}\n"
    assert parse_recipe(text).usual_learning_rate == rate


def test_what_is_required_is_named() -> None:
    assert message_of("stage: sft") == "my.yaml: model: this key is required"
    assert message_of("model: {}\nstage: sft") == "my.yaml: model.name_or_path: this key is required"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a recipe is a mapping of sections"),
        ("- sft", "a recipe is a mapping of sections"),
        ("stage: sft\nmodel: {name: ", "my.yaml, line 2: not valid YAML"),
        ("stage: sft\nmodel: {}\nstage: sft", "my.yaml, line 3: not valid YAML: key 'stage' is given twice"),
        ("stage: sft\n\tmodel: {}", "my.yaml, line 2: not valid YAML"),
        ("stage: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        ("x: " + 5000 * "[", "nested too deeply"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text: str, expected: str) -> None:
    assert expected in message_of(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin1.yaml").write_bytes("stage: sft # Müller".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin1\.yaml: cannot be read as UTF-8 text"):
        load_recipe(tmp_path / "latin1.yaml")


def test_overrides_are_read_as_yaml_and_make_missing_sections() -> None:
    overrides = ["training.learning_rate=1e-4", "data.train=[a.txt, b.txt]", "tuning.lora.r=2", "output=out dir"]
    recipe = parse_recipe(MINIMAL, overrides=overrides)
    assert recipe.training.learning_rate == 1e-4
    assert recipe.data.train == ["a.txt", "b.txt"]
    assert (recipe.tuning.lora.r, recipe.output) == (2, "out dir")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate", "'learning_rate': an override is KEY=VALUE"),
        ("=3", "'=3': an override is KEY=VALUE"),
        ("training..seed=3", "an override is KEY=VALUE"),
        ("stage.x=3", "stage.x: 'stage' is a value, not a section"),
        ("training.sed=3", "training.sed: unknown key; did you mean 'seed'?"),
        ("training.seed=[", "training.seed, line 1: not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override: str, expected: str) -> None:
    assert expected in message_of(MINIMAL, override)


def test_the_resolved_recipe_reads_back_as_itself() -> None:
    recipe = parse_recipe(MINIMAL + FEDERATED + "training: {learning_rate: 3e-5, warmup_steps: 4}")
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_the_engine_digest_covers_the_training_and_not_where_things_lie() -> None:
    digest = parse_recipe(MINIMAL + FEDERATED).engine_digest
    elsewhere = ["model.name_or_path=other", "output=runs/b", "data.train=x.txt", "deepspeed.processes=2"]
    assert parse_recipe(MINIMAL + FEDERATED, overrides=elsewhere).engine_digest == digest
    for change in ("training.seed=1", "tuning.mode=full", "topology.local_steps=4", "stage=pretrain"):
        assert parse_recipe(MINIMAL + FEDERATED, overrides=[change]).engine_digest != digest


def test_total_steps_follow_the_topology() -> None:
    both = MINIMAL + FEDERATED + "training: {max_steps: 50}"
    assert parse_recipe(both).total_steps == 6
    assert parse_recipe(both, overrides=["topology.kind=central"]).total_steps == 50
    assert parse_recipe(MINIMAL + FEDERATED, overrides=["topology.kind=central"]).total_steps == 6
    assert parse_recipe(MINIMAL).total_steps is None


_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(section=st.sampled_from(list(Recipe.model_fields)), value=_VALUES)
def test_no_value_of_a_section_ends_in_anything_but_a_recipe_or_an_input_error(section: str, value: Any) -> None:
    document = {**yaml.safe_load(MINIMAL), section: value}
    with suppress(InputError):
        parse_recipe(yaml.safe_dump(document, allow_unicode=True))


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab1:- {}[]'\"\n\t&*!|>#%,?", max_size=60))
def test_no_text_ends_in_anything_but_an_input_error(text: str) -> None:
    with pytest.raises(InputError):
        parse_recipe(text)
