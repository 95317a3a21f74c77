"""Sampled answers: their layout, where they end, what a judge is shown of them, and what a wrong recipe is told."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from core_training.data.examples import IGNORED, Example, Tokens
from core_training.data.records import Record
from core_training.data.rows import COLUMNS, Collator
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.trainable import means
from core_training.models.base_model import BaseModel
from core_training.recipe.schema import Recipe
from core_training.stages.reward_functions import Answered, FunctionJudge, RewardFunction, load_function
from core_training.stages.rewards import load_judge
from core_training.stages.rollout import Sampler, prompt_lengths, texts
from tests import tiny
from tests.tiny import tiny_tokenizer

MakeRecipe = Callable[..., Recipe]
PROMPTS = [[1, 3, 40, 41, 42, 4], [1, 3, 50, 4], [7], [1, 3, 60, 61, 62, 63, 64, 65, 66, 4]]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    """The tiny model with its layers scaled up: as it is, it repeats the last token whatever comes before."""
    recipe = {"model": {"name_or_path": str(tiny_model)}, "stage": "sft", "tuning": {"mode": "full"}}
    base = BaseModel(Recipe.model_validate(recipe))
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.mul_(15)
    return base


def batch_of(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    return Collator(0)([(Example((Tokens(one, one),)),) for one in ids])


def sampler(**changes: Any) -> Sampler:
    return replace(Sampler(max_new_tokens=12, temperature=1.0, top_p=1.0, stop_ids=[2], pad_token_id=0), **changes)


def test_prompt_lengths_are_known_from_a_padded_batch() -> None:
    assert prompt_lengths(batch_of(PROMPTS)).tolist() == [6, 4, 1, 10]


def test_batched_answers_are_those_of_each_prompt_alone(base: BaseModel) -> None:
    """With a nucleus of one token, sampling is greedy: padding on the left must not change what comes."""
    answers = sampler(top_p=1e-6).sample(base.model, batch_of(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert answers["input_ids"][row, : len(ids)].tolist() == ids
        assert not answers["input_ids"][row, len(ids) :].any()
        labels = answers["labels"][row]
        assert labels[: len(prompt)].tolist() == [-100] * len(prompt)
        assert labels[len(prompt) : len(ids)].tolist() == ids[len(prompt) :]
        assert (labels[len(ids) :] == -100).all()


def test_an_answer_ends_at_the_first_stop_token_and_says_whether_one_came(base: BaseModel) -> None:
    torch.manual_seed(0)
    stop_ids = list(range(2, 60))
    answers = sampler(stop_ids=stop_ids).sample(base.model, batch_of(PROMPTS), generations=8)
    assert len(answers["input_ids"]) == 32
    assert 0 < answers["ended"].sum() < 32
    for labels, ended in zip(answers["labels"], answers["ended"], strict=True):
        tokens = labels[labels != -100].tolist()
        assert not set(tokens[:-1]) & set(stop_ids)
        assert bool(ended) == (tokens[-1] in stop_ids)
        assert ended or len(tokens) == 12


def test_answers_to_one_prompt_stand_next_to_each_other(base: BaseModel) -> None:
    answers = sampler().sample(base.model, batch_of(PROMPTS), generations=3)
    for row, ids in enumerate(answers["input_ids"]):
        prompt = PROMPTS[row // 3]
        assert ids[: len(prompt)].tolist() == prompt


def test_tokens_are_drawn_from_the_tempered_distribution(base: BaseModel) -> None:
    """4,000 first tokens against softmax(logits / T); the model's own generation settings have no say."""
    base.model.generation_config.top_k = 1
    base.model.generation_config.repetition_penalty = 1.5
    torch.manual_seed(0)
    answers = sampler(max_new_tokens=1, temperature=0.5).sample(base.model, batch_of([PROMPTS[0]]), generations=4000)
    drawn = torch.bincount(answers["labels"][:, 6], minlength=400) / 4000
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits / 0.5).softmax(-1)
    assert float((drawn - expected).abs().sum()) / 2 < 0.15  # total variation; another temperature gives over 0.2


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 1.5},
        {"top_k": 3},
        {"num_beams": 4},
        {"suppress_tokens": list(range(5, 390))},
        {"epsilon_cutoff": 0.5},
        {"forced_eos_token_id": 7},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a", "e"]},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_models_own_generation_settings_have_no_say_and_are_kept(
    base: BaseModel, own: dict[str, Any], adapted: bool
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GenerationConfig

    answers = []
    for settings in (GenerationConfig(), GenerationConfig(**own)):
        plain = copy.deepcopy(base.model)
        plain.generation_config = settings
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        model = get_peft_model(plain, lora) if adapted else plain
        torch.manual_seed(0)
        answers.append(sampler().sample(model, batch_of(PROMPTS))["input_ids"])
        assert plain.generation_config is settings
    assert torch.equal(*answers)


def test_a_policy_that_has_diverged_can_be_asked(base: BaseModel) -> None:
    """Its loss tells that it has; tokens drawn from NaN are outside the vocabulary, and end the process."""
    diverged = copy.deepcopy(base.model)
    with torch.no_grad():
        diverged.lm_head.weight.fill_(float("nan"))
    answers = sampler().sample(diverged, batch_of(PROMPTS))["input_ids"]
    assert 0 <= int(answers.min()) <= int(answers.max()) < diverged.config.vocab_size


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("rollout", {"temperature": 1e-40}),
        ("ppo", {"cliprange": 1e300}),
        ("ppo", {"cliprange_value": 1e300}),
        ("ppo", {"num_ppo_epochs": 10**9}),
        ("rloo", {"cliprange": 1e300}),
        ("rloo", {"num_generations": 10**9}),
        ("grpo", {"cliprange": 1e300}),
        ("grpo", {"num_iterations": 10**9}),
    ],
)
def test_numbers_that_no_process_survives_are_refused(
    make_recipe: MakeRecipe, section: str, values: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=rf"{section}\..*should be (greater|less) than or equal to"):
        make_recipe(**{section: values})


def test_the_judge_sees_texts_without_padding_special_tokens_and_what_ended_the_answer(base: BaseModel) -> None:
    tokenizer = base.tokenizer
    prompt, answer = tokenizer.encode("fever of the eye"), tokenizer.encode(" See the ward")
    stop = tokenizer.encode(".")
    answers = {
        "input_ids": torch.tensor([[1, *prompt, *answer, *stop, 0, 0]]),
        "labels": torch.tensor([[-100] * (1 + len(prompt)) + [*answer, *stop] + [-100, -100]]),
        "ended": torch.tensor([True]),
    }
    assert texts(answers, tokenizer) == (["fever of the eye"], [" See the ward"])
    assert texts(answers | {"ended": torch.tensor([False])}, tokenizer)[1] == [" See the ward."]


def test_a_stop_token_that_the_tokenizer_does_not_have_is_named(make_recipe: MakeRecipe, base: BaseModel) -> None:
    known = make_recipe(rollout={"stop": ["<|user|>", "."]}).rollout
    assert Sampler.of(known, base).stop_ids == [2, 3, *base.tokenizer.encode(".")]
    with pytest.raises(InputError, match=r"rollout\.stop: '<\|end\|>' is \d+ tokens"):
        Sampler.of(make_recipe(rollout={"stop": ["<|end|>"]}).rollout, base)


JUDGES = """
def lengths(prompts, completions):
    return [len(text) for text in completions]
def one(prompts, completions):
    return [1.0]
def endless(prompts, completions):
    return [float("inf")] * len(prompts)
def words(prompts, completions):
    return ["good"] * len(prompts)
def careless(prompts, completions):
    return [1 / len(text) for text in completions]
def huge(prompts, completions):
    return [1e300] * len(prompts)
def silent(prompts, completions):
    pass
def leaving(prompts, completions):
    raise SystemExit(3)
number = 3
"""
TYPED = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Reward:
    number: float = 0.5
def judge(prompts, completions):
    return [Reward().number for _ in completions]
"""


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"reward_function": "lengths"}, "not of the form FILE.py:name"),
        ({"reward_function": "nowhere.py:lengths"}, "nowhere.py: no such file"),
        ({"reward_function": "broken.py:lengths"}, "broken.py cannot be loaded: SyntaxError"),
        ({"reward_function": "judge.py:absent"}, "judge.py has no function 'absent'"),
        ({"reward_function": "judge.py:number"}, "judge.py has no function 'number'"),
        ({"reward_function": "judge.py:one"}, "returned 1 numbers for 2 completions"),
        ({"reward_function": "judge.py:endless"}, "returned inf"),
        ({"reward_function": "judge.py:huge"}, r"returned inf .*float32"),
        ({"reward_function": "judge.py:words"}, "failed: ValueError; it must return a list of numbers"),
        ({"reward_function": "judge.py:silent"}, "failed: TypeError; it must return a list of numbers"),
        ({"reward_function": "judge.py:careless"}, "failed: ZeroDivisionError in line 11"),
        ({"reward_function": "judge.py:leaving"}, "failed: SystemExit in line 17"),
        ({"reward_function": "exit.py:judge"}, "exit.py cannot be loaded: SystemExit: 3"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_training(
    make_recipe: MakeRecipe,
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rollout: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGES)
    Path("broken.py").write_text("def lengths(:")
    Path("exit.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match=message):
        load_judge(make_recipe(rollout=rollout), base).try_out(["a", "b"])


def test_reward_files_may_hold_dataclasses_and_share_a_name(
    make_recipe: MakeRecipe, base: BaseModel, tmp_path: Path
) -> None:
    numbers = []
    for folder in ("one", "other"):
        path = tmp_path / folder / "rewards.py"
        path.parent.mkdir()
        path.write_text(TYPED.replace("0.5", str(float(len(folder)))))
        judge = load_judge(make_recipe(rollout={"reward_function": f"{path}:judge"}), base)
        numbers.append(judge(sampler().sample(base.model, batch_of(PROMPTS[:1]))).total.tolist())
    assert numbers == [[3.0], [5.0]]


def failing(prompts: list[str], completions: list[str]) -> list[float]:
    raise KeyError(prompts[0] + completions[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, completions: [0.0, float("nan")], r"returned nan for completion 2 of 2"),
        (lambda prompts, completions: completions, r"failed: ValueError; it must"),
        (failing, r"failed: KeyError in line \d+; it must"),
    ],
)
def test_a_judge_that_fails_later_ends_the_run_and_tells_nothing_of_the_texts(
    base: BaseModel, function: Callable[..., Any], message: str
) -> None:
    judge = FunctionJudge([RewardFunction(function, f"{__file__}:name")], base.tokenizer)
    answers = sampler().sample(base.model, batch_of(PROMPTS[3:]), generations=2)
    with pytest.raises(RunError, match=message) as raised:
        judge(answers)
    assert not any(text in str(raised.value) for some in texts(answers, base.tokenizer) for text in some)


@pytest.mark.parametrize("cache", [False, True])
def test_a_function_is_given_the_columns_that_it_names(make_recipe: MakeRecipe, tmp_path: Path, cache: bool) -> None:
    """Each answer with the values of its own prompt's record, through the token cache too."""
    (tmp_path / "judge.py").write_text(
        "def exact(prompts, completions, answer, *, level=None):\n"
        "    assert all(str(a) in p for a, p in zip(answer, prompts)), (prompts, answer)\n"
        "    assert level is None or set(level) <= {None, 'hard'}\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    records = [{"prompt": f"What is {i}?", "answer": i, "source": "x"} for i in range(10, 19)]
    records[3]["level"] = "hard"
    data = tiny.write_jsonl(tmp_path / "d.jsonl", records)
    recipe = make_recipe(
        stage="grpo",
        data={"train": str(data), "columns": {}, "cache": str(tmp_path / "cache") if cache else None},
        rollout={"reward_function": f"{tmp_path / 'judge.py'}:exact", "max_new_tokens": 3},
    )
    for _ in range(1 + cache):
        engine = open_engine(recipe)
        assert engine.train(2).steps == 2
        engine.evaluate()
        engine.close()
    tiny.write_jsonl(tmp_path / "d.jsonl", [*records, {"prompt": "What?"}])
    with pytest.raises(InputError, match=r"d\.jsonl, line 10: no column 'answer', which rollout.reward_function"):
        open_engine(recipe)


def judge_by(*functions: Callable[..., Any]) -> FunctionJudge:
    return FunctionJudge([RewardFunction(function, f"f{i}") for i, function in enumerate(functions)], tiny_tokenizer())


def test_a_function_that_takes_any_columns_is_given_all_but_its_own_names() -> None:
    judge = judge_by(lambda prompts, completions, **columns: [])
    record = Record({"prompt": "p", "completion": "c", "answer": 1, "when": date(2026, 1, 2)}, Path("a.jsonl"), 1)
    assert json.loads(judge.columns_of(record)) == {"answer": 1, "when": "2026-01-02"}
    plain = judge_by(lambda prompts, completions: [])
    assert plain.columns_of(record) == b""


def test_several_functions_are_added_up_by_their_weights_and_reported_each(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Columns go to the function that names them alone; TRL's are among them by name."""
    (tmp_path / "judge.py").write_text(
        "def two(prompts, completions):\n    return [2.0] * len(prompts)\n"
        "def level(prompts, completions, level):\n    return [None if one is None else float(one) for one in level]\n"
    )
    records = [{"prompt": f"What is {i}?", "level": 3 if i % 2 else None} for i in range(10, 20)]
    functions = {
        f"{tmp_path / 'judge.py'}:two": 0.5,
        f"{tmp_path / 'judge.py'}:level": 2,
        "trl:think_format_reward": 1,
        "trl:soft_overlong_punishment": 1,
    }
    recipe = make_recipe(
        stage="grpo",
        data={"train": str(tiny.write_jsonl(tmp_path / "d.jsonl", records)), "columns": {}},  # type: ignore[arg-type]
        rollout={"reward_function": functions, "max_new_tokens": 5},
    )
    engine = open_engine(recipe)
    metrics = means(engine.train(2).figures)
    engine.close()
    assert metrics["reward_two"] == 2
    assert metrics["reward_think_format_reward"] == 0
    assert metrics["reward_soft_overlong_punishment"] <= 0
    parts = 1 + 2 * metrics["reward_level"] + metrics["reward_soft_overlong_punishment"]
    assert metrics["reward"] == pytest.approx(parts)


def test_functions_of_one_name_are_told_by_their_files() -> None:
    def same(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0] * len(prompts)

    judge = FunctionJudge([RewardFunction(same, "a.py:f"), RewardFunction(same, "b.py:f", 3.0)], tiny_tokenizer())
    judged = judge(answered())
    assert judged.total.tolist() == [4.0]
    assert list(judged.parts) == ["f", "f_2"]


def answered() -> dict[str, torch.Tensor]:
    """One answer, `4` or whatever token that is, to a prompt."""
    return {
        "input_ids": torch.tensor([[7, 8, 9]]),
        "labels": torch.tensor([[IGNORED, 8, 9]]),
        "ended": torch.tensor([False]),
    }


def test_trls_functions_are_called_as_trl_does() -> None:
    base: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    ids = base.tokenizer.encode("It is even.</think> \\boxed{4}")
    answers = {
        "input_ids": torch.tensor([[7, *ids]]),
        "labels": torch.tensor([[IGNORED, *ids]]),
        "ended": torch.tensor([False]),
        COLUMNS: torch.tensor([list(b'{"solution": "$4$"}')], dtype=torch.uint8),
    }
    names = ["accuracy_reward", "reasoning_accuracy_reward", "cosine_scaled_reward", "repetition_penalty_reward"]
    judge = FunctionJudge([load_function(f"trl:{name}", 1.0, 100) for name in names], base.tokenizer)
    assert judge.columns == ["solution"]
    parts = {name: part.tolist() for name, part in judge(answers).parts.items()}
    assert parts["accuracy_reward"] == parts["reasoning_accuracy_reward"] == [1.0]
    assert 0.9 < parts["cosine_scaled_reward"][0] <= 1
    with pytest.raises(InputError, match=r"TRL's functions here are accuracy_reward, .*, not 'nice'"):
        load_function("trl:nice", 1.0, 100)


def test_a_site_gives_its_own_functions_and_trls(make_recipe: MakeRecipe) -> None:
    from client.site_config import SiteConfig

    site = SiteConfig.model_validate(
        {"name": "north", "data": {"d": "d.jsonl"}, "models": {"m": "m"}, "reward_functions": {"brief": "j.py:brief"}}
    )
    rollout = {"reward_function": {"brief": 2, "trl:think_format_reward": 1}}
    recipe = make_recipe(model={"name_or_path": "m"}, data={"train": "d"}, stage="grpo", rollout=rollout)
    assert site.resolve(recipe).rollout.reward_functions == {"j.py:brief": 2, "trl:think_format_reward": 1}
    with pytest.raises(InputError, match="has no reward function 'other'"):
        site.resolve(
            make_recipe(
                model={"name_or_path": "m"},
                data={"train": "d"},
                stage="grpo",
                rollout={"reward_function": {"other": 1}},
            )
        )


def test_names_of_functions_are_names_of_figures(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Whatever they are called: a report holds figures of plain names alone."""
    long = "a" * 50
    (tmp_path / "judge.py").write_text(
        "".join(f"def {name}(prompts, completions):\n    return [1.0] * len(prompts)\n" for name in ("Brevity", long))
    )
    (tmp_path / "other.py").write_text((tmp_path / "judge.py").read_text())
    names = [f"{tmp_path / file}.py:{name}" for file in ("judge", "other") for name in ("Brevity", long)]
    recipe = make_recipe(
        stage="grpo",
        data={"train": str(tiny.write_jsonl(tmp_path / "d.jsonl", PROMPT_RECORDS)), "columns": {}},
        rollout={"reward_function": dict.fromkeys(names, 1), "max_new_tokens": 3},
        output=str(tmp_path / "run"),
    )
    from core_training.engine.central import train
    from core_training.runs.run_folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.prepare(recipe, resume=False)
    engine = open_engine(recipe)
    metrics = train(recipe, engine, folder).metrics
    engine.close()
    assert {"reward_brevity", "reward_brevity_2", "reward_" + "a" * 28, "reward_" + "a" * 28 + "_2"} <= metrics.keys()


PROMPT_RECORDS = [{"prompt": f"What is {i}?"} for i in range(20)]


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, answer: [(c, a) for c, a in zip(completions, answer, strict=True)],
        lambda completions, prompts, answer: [(c, a) for c, a in zip(completions, answer, strict=True)],
        lambda completions, **columns: [(c, a) for c, a in zip(completions, columns["answer"], strict=True)],
        lambda asked, said, answer: [(c, a) for c, a in zip(said, answer, strict=True)],
    ],
)
def test_a_function_gets_prompts_and_completions_by_name(function: Callable[..., Any]) -> None:
    """In whatever order, or one of them alone, as TRL's and other people's functions have them."""
    asked = Answered(["p"], ["c"], [[1]], [{"answer": "a"}])
    assert RewardFunction(function, "f")._answer(asked) == [("c", "a")]
