"""`fedloom data`: the records of a recipe as the model will read them."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console

from core_training.recipe.reading import load_recipe
from fedloom.console import plain, results_only_on_stdout, stderr
from fedloom.options import Overrides, RecipePath

app = typer.Typer(no_args_is_help=True, help="Look at the records of a recipe as the model will read them.")

_SHOWN = 3


@app.callback()
def _group() -> None:
    """Look at the records of a recipe as the model will read them."""


@app.command()
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, metavar="N", help="Records to show (3; with --json all).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a record, on standard output.")] = False,
) -> None:
    """Show records after template and tokenizer, what is learnt of them in green, and all records' lengths."""
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    from core_training.engine.tokenising import Outcome, tokenised_records
    from core_training.models.outline import Outline
    from core_training.stages.base import load_stage
    from fedloom.data_view import LOST_ANSWERS, Lengths, document_of, shown, styled, without_labels

    loaded = load_recipe(recipe, overrides)
    with results_only_on_stdout():
        base = Outline(loaded)
        stage = load_stage(loaded, base)
    outcome = Outcome()
    lengths, most = Lengths(), loaded.training.max_length
    packs = loaded.stage_part.packs and loaded.training.packing is not False
    console = Console(highlight=False)
    for number, one in enumerate(tokenised_records(loaded, stage, None, outcome, processes=os.cpu_count() or 1)):
        one = without_labels(one) if loaded.stage_part.samples else one
        lengths.add(one)
        if as_json:
            if limit is not None and number >= limit:
                break
            typer.echo(json.dumps(document_of(one, base.tokenizer), ensure_ascii=False))
        elif number < (_SHOWN if limit is None else limit):
            place = f"{one.record.place} ({'held out' if one.held_out else 'trains'})"
            console.print(plain(place), style="bold", soft_wrap=True)
            for tokens in shown(one):
                console.print(styled(tokens, base.tokenizer), soft_wrap=True)
                console.print(plain(f"  {len(tokens)} tokens, {tokens.loss_tokens} learnt\n"), style="cyan")
    if not as_json:
        for line in lengths.lines(most, packs=packs):
            console.print(plain(line), soft_wrap=True)
    if outcome.skipped:
        said = f"warning: {outcome.skipped} records are skipped; the first: {outcome.first_error}"
        stderr.print(plain(said), soft_wrap=True)
    if leak := lengths.leaks.warning():
        stderr.print(plain(f"warning: {leak}"), soft_wrap=True)
    if lengths.lost_share >= LOST_ANSWERS:
        stderr.print(
            plain(
                f"warning: training.max_length {most} cuts {lengths.lost_share:.0%} of the tokens that were to be "
                "learnt; raise it, or shorten the records"
            ),
            soft_wrap=True,
        )
