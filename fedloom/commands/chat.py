"""`fedloom chat`: a few words with what a run trained, in the terminal."""

from __future__ import annotations

import sys
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated

import typer

from core_training.foundation.errors import InputError
from core_training.foundation.foreign_text import printable
from core_training.foundation.stopping import number_of
from core_training.foundation.strict_json import strict_json
from fedloom.console import results_only_on_stdout, stderr
from fedloom.options import Base, Json, MaxTokens, RunPath, Site, Temperature

if TYPE_CHECKING:
    from core_training.models.conversation import Conversation

app = typer.Typer()


@app.command()
def chat(
    run: RunPath,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and exit.", show_default=False)
    ] = None,
    base: Base = None,
    site: Site = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, at a temperature above 0.")] = 0,
    as_json: Json = False,
) -> None:
    """Talk with what was trained, or ask it once (--prompt). A line at a time; /quit or Ctrl-D ends it."""
    from core_training.models.results import find_result

    if as_json and prompt is None:
        raise InputError("--json: it goes with --prompt TEXT, for one answer")
    result = find_result(run, base, site)
    if result.recipe.stage == "reward":
        raise InputError(f"{run} is a reward model: it scores answers and gives none; see rollout.reward_model")
    from core_training.models.conversation import Conversation, Sampling
    from core_training.models.results import load_result

    with results_only_on_stdout():
        loaded = load_result(result)
    conversation = Conversation(loaded, Sampling(max_tokens, temperature, seed))
    if not conversation.has_template:
        stderr.print("this model has no chat template: it continues the text it is given")
    if prompt is None:
        _talk(conversation)
    elif as_json:
        answer = conversation.reply(prompt)
        typer.echo(
            strict_json({"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended})
        )
    else:
        conversation.reply(prompt, _write)
        _write("\n")


def _talk(conversation: Conversation) -> None:
    """Turn by turn until the person leaves. Ctrl-C ends an answer, and at the prompt the conversation."""
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt) as end:
            _leave_if_stopped(end)
            stderr.print()
            return
        if text.strip() == "/quit":
            return
        if not text.strip():
            continue
        try:
            conversation.reply(text, _write)
        except InputError as error:
            stderr.print(f"error: {error}")
        except KeyboardInterrupt as end:
            _leave_if_stopped(end)
        _write("\n")


def _leave_if_stopped(end: BaseException) -> None:
    """Go on with a signal that is no Ctrl-C, which ends no more than an answer."""
    if isinstance(end, KeyboardInterrupt) and number_of(end) != SIGINT:
        raise end


_KEPT = "\n\t\u200c\u200d"
"""Of what is not printed by itself: with the joiners, letters of many languages are others."""


def _write(text: str) -> None:
    """Stream a model's words, which are as much its maker's as the person's who asks."""
    sys.stdout.write(printable(text, kept=_KEPT))
    sys.stdout.flush()
