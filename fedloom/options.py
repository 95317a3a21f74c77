"""The options that several commands share, so that they look and mean the same everywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from core_training.foundation.errors import InputError
from core_training.foundation.foreign_text import printable
from core_training.foundation.strict_json import strict_json
from core_training.recipe.home import STANDARD_INPUT

if TYPE_CHECKING:
    from core_training.recipe.schema import Recipe

RecipePath = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="The recipe file (YAML); - is standard input.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides, such as training.learning_rate=1e-4.", show_default=False
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder, in place of the recipe's output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output; all else on standard error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no table.")]
Site = Annotated[
    str | None,
    typer.Option("--site", metavar="NAME", help="Of a simulation whose sites ended with different results: which one."),
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--plain", help="Through the chat template, or not. Unset: where the model has one."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="DIR",
        help="The base model's folder or hub name, where the recipe's name for it is none here.",
    ),
]


class _HomePath(click.Path):
    """A path in which a shell has left `~` or `~user` as it was, as it does after an equals sign."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


def expand_home(command: click.Command) -> None:
    """Let a command, and those under it, know their paths' `~` as the home folder."""
    for parameter in command.params:
        if type(parameter.type) is not _HomePath and isinstance(parameter.type, click.Path):
            known = parameter.type
            parameter.type = _HomePath(path_type=known.type, allow_dash=known.allow_dash)
    for below in getattr(command, "commands", {}).values():
        expand_home(below)


def paths_by_name(options: list[str], option: str) -> dict[str, list[str]]:
    """`NAME=PATH` options as absolute paths by name. Raises InputError for one of another form."""
    named: dict[str, list[str]] = {}
    for text in options:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"{option} '{text}': give a name and a path, such as {option} medquad=/data/medquad.jsonl")
        named.setdefault(name, []).append(str(Path(os.path.expanduser(path)).absolute()))
    return named


def models_by_name(options: list[str], option: str) -> dict[str, str]:
    """`NAME=PLACE` options: a folder's absolute path, or a hub name, which is said. Raises as `paths_by_name`."""
    from core_training.foundation.hub_models import hub_model

    models = {name: own[-1] for name, own in paths_by_name(options, option).items()}
    for name, _, place in (text.partition("=") for text in options):
        if hub_model(place) is not None:
            models[name] = place
            typer.echo(f"{option} {name}: {place} is no folder here, so it is a model's name on the hub", err=True)
    return models


@contextmanager
def as_file(path: Path, recipe: Recipe) -> Iterator[list[str]]:
    """This command's arguments with a file in the place of a recipe that came on standard input, for other processes.

    The file is there while the block runs. `path` is the recipe's on the command line.
    """
    arguments = sys.argv[1:]
    if path != STANDARD_INPUT:
        yield arguments
        return
    with NamedTemporaryFile("w", prefix="recipe-", suffix=".yaml", encoding="utf-8") as file:
        file.write(recipe.to_yaml())
        file.flush()
        arguments[arguments.index(str(path))] = file.name
        yield arguments


def print_answer(document: dict[str, Any], text: str, *, as_json: bool) -> None:
    """A command's answer on standard output: with --json the document, else the text."""
    typer.echo(strict_json(document) if as_json else printable(text, kept="\n"))
