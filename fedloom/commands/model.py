"""`fedloom model`: fetch a base model by its name on the hub, once. Parses, calls, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.options import Json, Quiet, print_answer

app = typer.Typer(no_args_is_help=True, help="Base models by their names on the hub.")


@app.callback()
def _group() -> None:
    """Base models by their names on the hub."""


@app.command()
def get(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME[@REVISION]", help="OWNER/NAME, at a branch, tag or commit.", show_default=False),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Copy its files there, too: a new folder, or an empty one."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a base model into this machine's cache, unless it is there, and say where it lies and what it is.

    Then recipes name it (model.name_or_path: OWNER/NAME), and nothing else is fetched. To train where no hub can be
    reached, fetch it elsewhere with --to DIR, carry the folder over, and name that.

    Fetched are safetensors, tokenizer, configuration and chat template; no pickles, no code. The cache is that of the
    Hugging Face tools (HF_HOME, HF_HUB_CACHE), and so is the token for models that ask for one (HF_TOKEN, or `hf auth
    login`). HF_ENDPOINT names another hub.

    For example: fedloom model get HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from core_training.foundation.durable import new_folder
    from core_training.foundation.errors import InputError
    from core_training.foundation.hub_fetch import fetch
    from core_training.foundation.hub_models import copy_model, hub_model
    from core_training.foundation.model_files import weights_digest

    model = hub_model(name)
    if model is None:
        what = "a folder here" if Path(name).is_dir() else "no name of a model on the hub, such as OWNER/NAME"
        raise InputError(f"{name} is {what}; there is nothing to fetch")
    target = None if to is None else new_folder(to)
    here = model.snapshot()
    folder = here or fetch(model, quiet=quiet).folder
    pinned = model.at(folder.name)
    if target is not None:
        copy_model(folder, target)
    digest, place = weights_digest(folder), target or folder
    document = {"name": model.name, "revision": folder.name, "digest": digest, "folder": str(place)}
    print_answer(
        {**document, "fetched": here is None},
        f"{pinned}\n"
        f"  {'was here already' if here else 'fetched'}: {place}\n"
        f"  SHA-256 of its weights: {digest}\n"
        f"In a recipe: model: {{name_or_path: {target or pinned}}}",
        as_json=as_json,
    )
