"""`fedloom export`: a run's result as an adapter or a merged model, in the layout other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from core_training.foundation.strict_json import strict_json
from fedloom.console import results_only_on_stdout, stderr
from fedloom.options import Base, Json, Quiet, RunPath, Site

app = typer.Typer()


@app.command()
def export(
    run: RunPath,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder to write: new, or empty.", show_default=False)
    ],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base: one whole model.")] = False,
    base: Base = None,
    site: Site = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's result as PEFT, transformers and vLLM load it: its adapter, or (--merge) a whole model."""
    from core_training.models.results import export_adapter, export_model, find_result

    result = find_result(run, base, site)
    adapter = result.is_adapter and not merge
    tokenizer = True
    with results_only_on_stdout():
        if adapter:
            tokenizer = export_adapter(result, to)
        else:
            export_model(result, to)
    kind = "adapter" if adapter else "model"
    if as_json:
        typer.echo(strict_json({"folder": str(to), "kind": kind, "base": result.base_name, "tokenizer": tokenizer}))
    elif not quiet:
        stderr.print(f"wrote the {kind} to {to}", soft_wrap=True)
        if adapter and (added := result.recipe.model.add_tokens):
            stderr.print(
                f"its base may lack rows for the {len(added)} added tokens; where it has fewer than the tokenizer has "
                "tokens: model.resize_token_embeddings(len(tokenizer)). --merge writes a model that has them",
                soft_wrap=True,
            )
        if not tokenizer:
            stderr.print("without a tokenizer, as the base model is not on this machine; --base DIR names it")
