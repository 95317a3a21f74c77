"""`fedloom tune`: a search for the values of a recipe's keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloom.options import Json, Quiet, print_answer

if TYPE_CHECKING:
    from experiments.running import OnProgress
    from experiments.search.trial import Ended

app = typer.Typer()


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(metavar="SEARCH", help="The search's file (YAML).", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the search, in place of the file's output.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="There has to be a search to go on with; without it, it goes on, too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search for the values of a recipe's keys with which a figure of its runs is best.

    The same command goes on with a search, and several at once share it. Needs the extra `search`.
    """
    from core_training.foundation.stopping import saying
    from experiments.search.carrying_out import carry_out
    from experiments.search.definition import load_search
    from fedloom.console import results_only_on_stdout, stderr, ticking
    from fedloom.search_page import write_page

    search = load_search(file, out)
    if not quiet and search.base.privacy.differential_privacy is not None:
        stderr.print(
            "differential privacy: each trial trains on the same records, and all are charged, pruned ones too: "
            f"`fedloom privacy {search.output}` says what they came to together",
            soft_wrap=True,
        )

    @contextmanager
    def watch(label: str) -> Iterator[OnProgress]:
        with ticking(label, "step", quiet=quiet or as_json or not stderr.is_terminal) as ticker:
            yield ticker.advance

    def tell(number: int, ended: Ended, values: dict[str, Any]) -> None:
        if not quiet:
            said = ", ".join(
                f"{one.figure} {value:.5g}" for one, value in zip(search.objectives, ended.values or [], strict=False)
            )
            shown = ", ".join(f"{key.split('.')[-1]} {_short(value)}" for key, value in values.items())
            stderr.print(f"trial {number}: {said or ended.state}{' · ' + ended.why if ended.why else ''} ({shown})")

    with saying(lambda: "interrupted; the same command goes on"), results_only_on_stdout():
        outcome = carry_out(search, watch, tell, must_exist=resume)
        report = search.output / "report.html"
        write_page(search, outcome, report)
    document = {**outcome.document(), "report": str(report)}
    if as_json:
        print_answer(document, "", as_json=True)
    elif not quiet:
        best = document["best"]
        if best is not None:
            said = ", ".join(f"{key} {_short(value)}" for key, value in best["keys"].items())
            stderr.print(f"best: {best['value']} with {said}", soft_wrap=True)
        stderr.print(
            f"{document['trials']} trials, {document['pruned']} pruned: {search.output / 'best.yaml'}, {report}",
            soft_wrap=True,
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
