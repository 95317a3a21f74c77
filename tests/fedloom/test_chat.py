"""A few words with what was trained: it says what it learnt, streams it, and keeps to what the model can take."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import pytest

from core_training.foundation.errors import InputError
from core_training.foundation.stopping import raise_stop
from core_training.models.base_model import BaseModel
from core_training.models.conversation import Answer, Conversation, Sampling
from core_training.models.results import find_result, load_result
from core_training.recipe.reading import parse_recipe
from tests import tiny
from tests.families.building import make_family
from tests.fedloom.conftest import Command

QUESTION, ANSWER = "Case 7: fever of the heart?", "See the heart ward: fever."


@pytest.fixture(scope="module")
def learnt(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a model that learnt one answer by heart."""
    from core_training.distributed.launch import opened_engine
    from core_training.engine.central import train
    from core_training.runs.run_folder import RunFolder

    folder = tmp_path_factory.mktemp("learnt")
    data = tiny.write_jsonl(folder / "one.jsonl", [{"prompt": QUESTION, "completion": ANSWER}])
    recipe = parse_recipe(
        f"model: {{name_or_path: '{tiny_model}'}}\nstage: sft\ntuning: {{mode: full}}\n"
        f"data: {{train: '{data}', eval_fraction: 0}}\n"
        "training: {learning_rate: 1e-2, max_steps: 40, max_length: 128, per_device_train_batch_size: 1}\n"
    )
    run = RunFolder(folder / "run")
    with opened_engine(recipe) as engine:
        run.prepare(recipe, resume=False)
        train(recipe, engine, run)
    return run.path


@pytest.fixture(scope="module")
def base(learnt: Path) -> BaseModel:
    return load_result(find_result(learnt))


def test_it_says_what_it_learnt_and_exits(fedloom: Command, learnt: Path) -> None:
    outcome = fedloom("chat", learnt, "--prompt", QUESTION)
    assert (outcome.code, outcome.out) == (0, ANSWER + "\n")


def test_what_it_says_acts_on_no_terminal(fedloom: Command, learnt: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its tokenizer puts what acts on a terminal into an answer; joiners, which make letters, stay."""
    shutil.copytree(tiny_model, tmp_path / "base")
    rules = tmp_path / "base" / "tokenizer.json"
    document = json.loads(rules.read_text())
    said = {"type": "Replace", "pattern": {"String": "fever"}, "content": "fe\x1b[2J\u202ever\t\u200d"}
    document["decoder"] = {"type": "Sequence", "decoders": [document["decoder"], {"type": "Fuse"}, said]}
    rules.write_text(json.dumps(document))
    outcome = fedloom("chat", learnt, "--base", tmp_path / "base", "--prompt", QUESTION)
    assert outcome.code == 0, outcome.err
    assert outcome.out == ANSWER.replace("fever", "fe [2J ver\t\u200d") + "\n"


def test_json_is_one_object(fedloom: Command, learnt: Path) -> None:
    outcome = fedloom("chat", learnt, "--prompt", QUESTION, "--json")
    document = json.loads(outcome.out)
    assert document["answer"] == ANSWER
    assert document["ended"] is True
    cut = json.loads(fedloom("chat", learnt, "--prompt", QUESTION, "--json", "--max-tokens", 2).out)
    assert (cut["tokens"], cut["ended"]) == (2, False)
    assert ANSWER.startswith(cut["answer"])


def test_lines_are_answered_until_they_end(fedloom: Command, learnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n/quit\nnever asked\n"))
    outcome = fedloom("chat", learnt)
    assert (outcome.code, outcome.out) == (0, ANSWER + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION))
    assert fedloom("chat", learnt).out == ANSWER + "\n"


def test_an_interrupt_ends_an_answer_and_not_the_conversation(
    fedloom: Command, learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Conversation.reply

    def interrupted(self: Conversation, text: str, on_text: Callable[[str], None]) -> Answer:
        if text == "stop":
            on_text("half an")
            raise KeyboardInterrupt
        return reply(self, text, on_text)

    monkeypatch.setattr(Conversation, "reply", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"stop\n{QUESTION}\n"))
    outcome = fedloom("chat", learnt)
    assert (outcome.code, outcome.out) == (0, f"half an\n{ANSWER}\n")


def test_another_signal_ends_the_conversation(fedloom: Command, learnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conversation, "reply", lambda *_: raise_stop(Signals.SIGTERM))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"stop\n{QUESTION}\n"))
    outcome = fedloom("chat", learnt)
    assert (outcome.code, outcome.out, outcome.err) == (143, "", "interrupted\n")


def test_what_is_streamed_is_the_answer(base: BaseModel) -> None:
    pieces: list[str] = []
    answer = Conversation(base, Sampling()).reply(QUESTION, pieces.append)
    assert "".join(pieces) == answer.text == ANSWER
    assert len(pieces) > 3


def test_draws_follow_the_seed(base: BaseModel) -> None:
    def said(seed: int) -> str:
        return Conversation(base, Sampling(40, 5.0, seed)).reply(QUESTION).text

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_a_long_conversation_forgets_its_oldest_turns(base: BaseModel) -> None:
    conversation = Conversation(base, Sampling(max_tokens=60, temperature=3.0))
    for _ in range(8):  # together far more than the 256 tokens the model takes
        conversation.reply("pain of the liver, rash of the skin, " * 3)


@pytest.mark.parametrize(("text", "expected"), [("ward " * 400, "this model takes 255 at the most"), (" ", "is empty")])
def test_a_prompt_that_leaves_no_room_or_says_nothing_is_refused(
    fedloom: Command, learnt: Path, text: str, expected: str
) -> None:
    outcome = fedloom("chat", learnt, "--prompt", text)
    assert outcome.code == 2
    assert expected in outcome.err


def test_an_answer_never_goes_beyond_what_the_model_takes(base: BaseModel) -> None:
    conversation = Conversation(base, Sampling(max_tokens=4000, temperature=5.0))
    prompt = "rash of the skin " * 10
    taken = len(base.tokenizer(prompt)["input_ids"])
    assert conversation.reply(prompt).tokens <= 256 - taken


def test_a_model_without_a_chat_template_continues_the_text(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    conversation = Conversation(base, Sampling())
    assert not conversation.has_template
    assert conversation.reply("See the").text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--json"], "--json: it goes with --prompt TEXT"),
        (["--base", "absent"], "--base: absent: no such folder"),
    ],
)
def test_wrong_arguments_are_named_at_once(fedloom: Command, learnt: Path, arguments: list[str], expected: str) -> None:
    outcome = fedloom("chat", learnt, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert expected in outcome.err


@pytest.mark.slow
def test_at_a_terminal_it_asks_answers_and_leaves_at_the_end_of_input(
    learnt: Path, environment: dict[str, str]
) -> None:
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedloom.cli", "chat", str(learnt)],
        stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(its)
    _until(mine, lambda text: text.endswith("you> "))
    os.write(mine, f"{QUESTION}\n".encode())
    heard = _until(mine, lambda text: text.endswith("you> "))
    assert heard.splitlines() == [QUESTION, ANSWER, "you> "]
    os.write(mine, b"\x04")  # Ctrl-D
    assert process.wait(timeout=60) == 0
    os.close(mine)


def _until(terminal: int, satisfied: Callable[[str], bool], patience: float = 120.0) -> str:
    """What is written to the terminal until that is as wanted."""
    heard, deadline = "", time.monotonic() + patience
    while not satisfied(heard):
        assert time.monotonic() < deadline, heard
        heard += os.read(terminal, 4096).decode(errors="replace")
    return heard


def test_a_refused_prompt_leaves_the_conversation_as_it_was(base: BaseModel) -> None:
    conversation = Conversation(base, Sampling())
    with pytest.raises(InputError):
        conversation.reply("ward " * 400)
    assert conversation.reply(QUESTION).text == ANSWER


def test_a_model_of_a_family_that_cannot_write_says_so(tiny_model: Path, tmp_path: Path) -> None:
    model = make_family("xlstm", tiny_model, tmp_path / "xlstm")
    base = BaseModel(parse_recipe(f"model: {{name_or_path: '{model}'}}\nstage: sft\ndata: {{train: none.jsonl}}\n"))
    with pytest.raises(InputError, match=r"chat: a xLSTMForCausalLM cannot write here: .* failed: ValueError: matC"):
        Conversation(base, Sampling(max_tokens=4))
