"""`fedloom recipe`: check one, show it resolved, print the schema, or write a new one."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from core_training.recipe import load_recipe
from fedloom.options import Json, Overrides, RecipePath

app = typer.Typer(no_args_is_help=True, help="Check, show or start a recipe.")


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """Say whether a recipe is valid, and what it would do."""
    loaded = load_recipe(recipe, overrides)
    line = f"{recipe}: valid: {loaded.stage}, {loaded.tuning.mode}, {loaded.topology.kind}"
    typer.echo(json_module.dumps({"valid": True, "recipe": loaded.model_dump()}) if json else line)


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None, json: Json = False) -> None:
    """Print the recipe with every default written out."""
    loaded = load_recipe(recipe, overrides)
    typer.echo(json_module.dumps(loaded.model_dump()) if json else loaded.to_yaml().rstrip())


@app.command()
def schema(markdown: Annotated[bool, typer.Option(help="As a page of documentation.")] = False) -> None:
    """Print the recipe's JSON schema (editors can check against it), or its reference page."""
    from core_training.recipe import Recipe
    from fedloom.recipe_page import recipe_page

    typer.echo(recipe_page().rstrip() if markdown else json_module.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def new(
    path: Annotated[Path | None, typer.Argument(help="File to write; without it, print.", show_default=False)] = None,
    stage: Annotated[str, typer.Option(help="pretrain | sft")] = "sft",
    tuning: Annotated[str, typer.Option(help="full | lora")] = "lora",
    topology: Annotated[str, typer.Option(help="central | federated | gossip")] = "federated",
) -> None:
    """Write a recipe to start from."""
    from core_training.durable import commit_file
    from core_training.errors import InputError
    from fedloom.recipe_page import starter_recipe

    text = starter_recipe(stage, tuning, topology)
    if path is None:
        typer.echo(text.rstrip())
    elif path.exists():
        raise InputError(f"{path} exists already; name a new file")
    else:
        commit_file(path, text.encode())
        typer.echo(f"wrote {path}", err=True)
