"""`fedloom data`: the records of a recipe as the model will read them."""

from __future__ import annotations

from typing import Annotated

import typer

from core_training.foundation.foreign_text import printable
from core_training.foundation.strict_json import strict_json
from core_training.recipe.reading import load_recipe
from fedloom.console import console, results_only_on_stdout, stderr
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
    """Show records after template and tokenizer, what is learnt of them in green (or in «…»), and all lengths."""
    import core_training.foundation.environment  # noqa: F401 - before PyTorch is imported
    from core_training.engine.tokenising import Outcome, tokenised_records
    from core_training.foundation.processes import available_cores
    from core_training.models.context import context_length
    from core_training.models.outline import Outline
    from core_training.recipe.model_source import on_this_machine
    from core_training.stages.base import load_stage
    from fedloom.data_view import LOST_ANSWERS, Lengths, document_of, shown, styled, without_labels

    loaded = on_this_machine(load_recipe(recipe, overrides))
    with results_only_on_stdout():
        base = Outline(loaded)
        stage = load_stage(loaded, base)
    outcome = Outcome()
    lengths, most = Lengths(), loaded.training.max_length
    out = console()
    wrapped = not out.is_terminal  # a file's lines are as long as they are; a terminal's are broken between words
    for number, one in enumerate(tokenised_records(loaded, stage, None, outcome, processes=available_cores())):
        one = without_labels(one) if loaded.stage_part.samples else one
        lengths.add(one)
        if as_json:
            if limit is not None and number >= limit:
                break
            typer.echo(strict_json(document_of(one, base.tokenizer), ensure_ascii=False))
        elif number < (_SHOWN if limit is None else limit):
            place = f"{one.record.place} ({'held out' if one.held_out else 'trains'})"
            out.print(printable(place), style="bold", soft_wrap=wrapped)
            for tokens in shown(one):
                out.print(styled(tokens, base.tokenizer, in_colour=bool(out.color_system)), soft_wrap=wrapped)
                out.print(printable(f"  {len(tokens)} tokens, {tokens.loss_tokens} learnt"), style="cyan")
            out.print()
    if not as_json:
        for line in lengths.lines(loaded, context_length(base.model)):
            out.print(printable(line), soft_wrap=wrapped)
    lost = lengths.lost_share
    cut = f"training.max_length {most} cuts {lost:.0%} of what was to be learnt; raise it, or shorten the records"
    warnings = [*outcome.warnings(), lengths.leaks.warning(), cut if lost >= LOST_ANSWERS else ""]
    for warning in filter(None, warnings):
        stderr.print(printable(f"warning: {warning}"), soft_wrap=True)
