"""`fedloom recipe`: check one, show it resolved, print the schema, or write a new one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from core_training.foundation.errors import InputError
from core_training.foundation.foreign_text import printable
from core_training.foundation.strict_json import strict_json
from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from fedloom.options import Json, Overrides, RecipePath

app = typer.Typer(no_args_is_help=True, help="Check, show or start a recipe.")

if TYPE_CHECKING:
    from core_training.recipe.schema import Recipe

TOPOLOGIES = ("central", "federated", "gossip")


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load model and data, try a few steps, say time and memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say whether a recipe is valid, what it would do, and what it protects."""
    from core_training.recipe.reading import load_recipe
    from fedloom.model_outlook import outlook_of
    from fedloom.privacy_account import privacy_of
    from fedloom.recipe_account import account_of, memory_of, warnings_of

    loaded = load_recipe(recipe, overrides)
    outlook = outlook_of(loaded)
    account = account_of(loaded, outlook.words if outlook else None)
    privacy, warnings = privacy_of(loaded), warnings_of(loaded)
    account["memory"], memory = memory_of(loaded)
    figures: dict[str, object] = {}
    if measure:
        account["takes"], figures, leak = _measured(loaded)
        warnings += [leak] if leak else []
    if as_json:
        said: dict[str, object] = {"account": {**account, "privacy": privacy}, "warnings": warnings}
        said["memory"] = {**asdict(memory), "training": memory.training, "peak": memory.peak} if memory else None
        said["reach"] = outlook.reach if outlook else None
        said |= {"measured": figures} if measure else {}
        typer.echo(strict_json({"valid": True, "recipe": loaded.model_dump(), **said}))
        return
    lines = [f"{recipe}: valid: {loaded.stage}, {loaded.tuning.mode}, {loaded.topology.kind}"]
    lines += [f"  {name:<12} {text}" for name, text in account.items()]
    lines += ["  privacy", *(f"    {name:<18} {text}" for name, text in privacy.items())]
    typer.echo(printable("\n".join(lines), kept="\n"))
    for warning in warnings:
        typer.echo(printable(f"warning: {warning}"), err=True)


def _measured(recipe: Recipe) -> tuple[str, dict[str, object], str]:
    """The figures of a few steps in words and as they are, and a warning of held-out answers in training."""
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    from core_training.recipe.model_source import on_this_machine
    from fedloom.console import results_only_on_stdout
    from fedloom.measuring import measured

    if recipe.deepspeed.used:
        raise InputError("--measure: it tries steps in this process alone, and the recipe has a deepspeed group")
    with results_only_on_stdout():
        figures = measured(on_this_machine(recipe))
    return figures.line(), {**asdict(figures), "seconds": figures.seconds}, figures.leak


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print the recipe with every default written out."""
    from core_training.recipe.reading import load_recipe

    loaded = load_recipe(recipe, overrides)
    typer.echo(strict_json(loaded.model_dump()) if as_json else loaded.to_yaml().rstrip())


@app.command()
def schema(markdown: Annotated[bool, typer.Option(help="As a page of documentation.")] = False) -> None:
    """Print the recipe's JSON schema (editors can check against it), or its reference page."""
    from core_training.recipe.schema import Recipe
    from fedloom.recipe_page import recipe_page

    typer.echo(recipe_page().rstrip() if markdown else strict_json(Recipe.model_json_schema(), indent=2))


@app.command()
def new(
    path: Annotated[Path | None, typer.Argument(help="File to write; without it, print.", show_default=False)] = None,
    stage: Annotated[
        str, typer.Option(click_type=click.Choice(list(STAGES)), help="What the model is trained for.")
    ] = "sft",
    tuning: Annotated[
        str, typer.Option(click_type=click.Choice(list(TUNING_MODES)), help="Which parameters are trained.")
    ] = "lora",
    topology: Annotated[
        str, typer.Option(click_type=click.Choice(TOPOLOGIES), help="Who trains, and how the results meet.")
    ] = "federated",
) -> None:
    """Write a recipe to start from."""
    from core_training.foundation.durable import commit_file
    from fedloom.starter_recipe import starter_recipe

    text = starter_recipe(stage, tuning, topology)
    if path is None:
        typer.echo(text.rstrip())
    elif path.exists():
        raise InputError(f"{path} exists already; name a new file")
    else:
        commit_file(path, text.encode())
        typer.echo(f"wrote {path}", err=True)
