"""`fedloom compare`: which of several models answers better, pair by pair, by a judge or by people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from core_training.foundation.errors import Interrupted
from core_training.foundation.foreign_text import printable
from core_training.foundation.strict_json import strict_json
from fedloom.console import console, results_only_on_stdout, stderr, ticking
from fedloom.evaluating import RESULTS, progress_bars, usual_folder
from fedloom.options import Base, Chat, Json, MaxTokens, Quiet, Site, Temperature

if TYPE_CHECKING:
    from evaluation.pairs.contest import Compared, Contest

app = typer.Typer()


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C...]",
            help="Two models at least: run folders, exported folders, base models.",
            show_default=False,
        ),
    ],
    on: Annotated[
        str,
        typer.Option(
            "--on",
            metavar="FILE|TASK.yaml",
            help="The prompts: records with a prompt or a question, conversations, a TASK.yaml, or held-out.",
            show_default=False,
        ),
    ],
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="Who judges: expected (nearer to the expected answers, by token F1), reward:RUN, model:RUN|MODEL, "
            "FILE.py:function, module:function, or people (a page here).",
        ),
    ] = "expected",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first so many prompts alone.")] = None,
    chat: Chat = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws, and of the order in which people see pairs.")] = 0,
    overlap: Annotated[
        bool, typer.Option("--overlap/--no-overlap", help="Look for the prompts in the runs' training records.")
    ] = True,
    annotators: Annotated[
        str, typer.Option("--annotators", metavar="NAME,…", help="Of judge people: who judges.")
    ] = "me",
    twice: Annotated[
        bool | None,
        typer.Option(
            "--twice/--once",
            help="Of judge people: each sees every pair in both orders, or in one, other people the other one. "
            "Unset: twice where there is one annotator.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of judge people: the page's; 0 takes a free one.")] = 0,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="Folder of answers.jsonl, verdicts.jsonl, preferences.jsonl, results.json and report.html. Unset: "
            "comparisons/MODEL-TASK beside the first run, or here. Answers and verdicts that are there are kept.",
        ),
    ] = None,
    base: Base = None,
    site: Site = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare models on prompts: each pair judged in both orders, ratings with 95 % intervals, pairs to train on."""
    from evaluation.items import Sampling
    from evaluation.pairs.contest import check_judge, check_models, load_contest, settle
    from evaluation.pairs.pair_judges import PEOPLE, judge_name
    from evaluation.running import Settings
    from evaluation.tasks.loading import load_tasks

    who = judge_name(judge)
    check_models(models)
    check_judge(who)
    names = _people(annotators) if who.kind == PEOPLE else []
    (task,) = load_tasks([on], models, "--on", metrics=("ended", "answer_tokens"), limit=limit, chat=chat)
    sampling = Sampling(max_tokens, temperature, 1, seed)
    settings = Settings(sampling, base=base, site=site, overlap=overlap)
    folder = to or usual_folder("comparisons", models[0], [task])
    with results_only_on_stdout(), progress_bars(quiet=quiet) as on_progress:
        contest = load_contest(models, task, who, settings, folder, on_progress)
        if who.kind != PEOPLE:
            from evaluation.pairs.contest import load_pair_judge

            contest.judge_all(load_pair_judge(contest, base), on_progress)
    stopped = None
    if who.kind == PEOPLE:
        both = len(names) == 1 if twice is None else twice
        contest.orders = 2 if both else 1
        stopped = _ask_people(contest, names, port, both=both, quiet=quiet)
    _tell(settle(contest), as_json=as_json, quiet=quiet)
    if stopped is not None:
        raise stopped


def _people(annotators: str) -> list[str]:
    from evaluation.pairs.people.desk import annotator_names

    return annotator_names(annotators.split(","))


def _ask_people(contest: Contest, names: list[str], port: int, *, both: bool, quiet: bool) -> Interrupted | None:
    """Serve the page until all is judged. A signal ends it before: what was judged is kept, and the error returned."""
    from core_training.foundation.stopping import number_of
    from evaluation.pairs.people.desk import Desk
    from evaluation.pairs.people.server import serving

    desk = Desk(contest, names, twice=both)
    if desk.is_done:
        return None
    try:
        with serving(desk, port) as server, ticking("verdicts", "look", quiet=quiet) as bar:
            for name, link in server.links().items():
                stderr.print(printable(f"{name}: {link}"), soft_wrap=True)
            stderr.print("Ctrl-C ends it; the same command goes on with what is left", soft_wrap=True)
            while not desk.is_done:
                server.changed.wait()
                server.changed.clear()
                bar.advance(*desk.progress)
    except KeyboardInterrupt as stop:
        done, total = desk.progress
        words = f"{done} of {total} looks are judged and kept; the same command goes on with what is left"
        return Interrupted(words, number_of(stop))
    return None


def _tell(found: Compared, *, as_json: bool, quiet: bool) -> None:
    """Write results and report, and tell them."""
    from core_training.foundation.durable import commit_json
    from fedloom.comparison_page import write_report

    document, folder = found.document, found.contest.folder
    commit_json(folder / RESULTS, document)
    report = write_report(found)
    for note in document["notes"]:
        stderr.print(printable(note), soft_wrap=True)
    if document["unjudged"]:
        said = f"{document['unjudged']} pairs were not judged: they are in no figure"
        stderr.print(said, soft_wrap=True)
    if as_json:
        typer.echo(strict_json(document))
        return
    if quiet:
        return
    _print_ratings(found)
    stderr.print(printable(f"wrote {report} and {document['preferences']['file']}"), soft_wrap=True)


def _print_ratings(found: Compared) -> None:
    from rich.table import Table

    from fedloom.comparison_page import RATING_COLUMNS, pair_words, rating_rows

    document = found.document
    title = f"{document['task']} · {document['prompts']} prompts · judged by {document['judge']}"
    shown = Table(title=printable(title), title_justify="left")
    for number, column in enumerate(RATING_COLUMNS):
        shown.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rating_rows(document):
        shown.add_row(*map(printable, row))
    console().print(shown)
    for words in pair_words(document):
        console().print(printable(words), soft_wrap=True)
