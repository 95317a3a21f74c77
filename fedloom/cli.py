"""The command line: parses, calls, prints. Every command is a module in `fedloom.commands`, imported when used."""

from __future__ import annotations

import logging
import sys
import traceback
from importlib import import_module
from typing import Any

import click
import typer
from typer.core import TyperGroup

from core_training import __version__
from core_training.distributed.leaving import leave
from core_training.foundation.environment import IGNORED  # before anything that might call home
from core_training.foundation.errors import FedloomError, Interrupted
from core_training.foundation.stopping import number_of, saying, stopping_at_once
from core_training.models.libraries import own_the_process
from fedloom.options import expand_home
from fedloom.streams import open_closed_streams, say, why_output_is_lost

COMMANDS = {
    "train": "Train on this machine: one process, or a DeepSpeed group.",
    "simulate": "Many sites on this machine: federated or gossip, as the recipe says.",
    "server": "The aggregation server of a federation.",
    "client": "A site of a federation.",
    "p2p": "A gossip node: training together without a server.",
    "recipe": "Check, show or start a recipe.",
    "data": "Look at records as the model will read them.",
    "model": "Fetch a base model once.",
    "tune": "Search for the values of a recipe's keys (extra `search`).",
    "pipeline": "Named steps that start from each other, each done once.",
    "evaluate": "How good runs and models are, on questions of one's own: figures with intervals.",
    "compare": "Which of several models answers better, judged pair by pair.",
    "report": "Curves and tables of runs that are there.",
    "privacy": "What runs have told of any one record or patient: ε, δ and what they rest on.",
    "export": "Write a result as an adapter or a merged model.",
    "merge": "Put finished runs of one start together, without training.",
    "chat": "A few words with what was trained.",
    "doctor": "What this machine has and lacks, and what to do about it.",
}


class _LazyCommands(TyperGroup):
    """Knows the commands' names and help; imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> Any:
        if name not in COMMANDS:
            return None
        if ctx.resilient_parsing or (ctx.args == [] and {"--help", "-h"} & set(sys.argv[1:2])):
            return click.Command(name, help=COMMANDS[name])
        command: Any = typer.main.get_command(import_module(f"fedloom.commands.{name}").app)
        command.name = name
        command.help = command.help or COMMANDS[name]
        expand_home(command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Carry the command out. A signal ends it with a word, here, before typer ends it without one."""
        with saying(lambda: "interrupted"), stopping_at_once():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_LazyCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models together where the data cannot move.",
    epilog="--traceback after any command shows where an error came from.",
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    if version:
        typer.echo(f"fedloom {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point. Exit codes: 0 done; 1 the run failed; 2 the input was wrong; 128 + n stopped by signal n."""
    open_closed_streams()
    try:
        code = _run()
    except SystemExit as end:  # how typer ends
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    leave(code)


def _run() -> int:
    arguments = sys.argv[1:]
    show_traceback = "--traceback" in arguments
    sys.argv[1:] = [argument for argument in arguments if argument != "--traceback"]
    own_the_process()
    if logging.lastResort is not None:  # notes go to standard error, also where a library has set logging up
        logging.getLogger("core_training").addHandler(logging.lastResort)
    if IGNORED:
        say(f"not heeded in the environment: {', '.join(IGNORED)}; the recipe says how to train")
    try:
        app()
        return 0
    except FedloomError as error:
        if show_traceback:
            traceback.print_exc()
        label = "" if isinstance(error, Interrupted) else "error: "
        say(f"{label}{error}")
        return error.exit_code
    except MemoryError:
        if show_traceback:
            traceback.print_exc()
        say("error: out of memory")
        return FedloomError.exit_code
    except OSError:
        if show_traceback:
            traceback.print_exc()
        if (reason := why_output_is_lost()) is None:
            raise
        say(f"error: standard output cannot be written: {reason}")
        return FedloomError.exit_code
    except KeyboardInterrupt as stop:  # while a command ended already
        say("interrupted")
        return 128 + number_of(stop)


if __name__ == "__main__":
    main()
