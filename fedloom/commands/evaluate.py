"""`fedloom evaluate`: how good runs and models are, on questions, records and conversations of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from core_training.foundation.errors import FedloomError, InputError, RunError
from core_training.foundation.foreign_text import printable
from core_training.foundation.stopping import saying
from core_training.foundation.strict_json import strict_json
from fedloom.console import console, results_only_on_stdout, stderr
from fedloom.evaluating import RESULTS, progress_bars, usual_folder
from fedloom.evaluation_bridges import Asked, Bridged, Loaded, bridged
from fedloom.options import Base, Chat, Json, MaxTokens, Quiet, Site, Temperature

if TYPE_CHECKING:
    from evaluation.figures.gates import Verdict
    from evaluation.running import Evaluation

app = typer.Typer()


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|MODEL...",
            help="Run folders, exported folders, base models (a folder, or a hub name in the cache).",
            show_default=False,
        ),
    ],
    on: Annotated[
        list[str],
        typer.Option(
            "--on",
            metavar="FILE|TASK.yaml",
            help="What to evaluate on: records, questions, a TASK.yaml, or held-out (what the first run held out). "
            "May be given several times.",
            show_default=False,
        ),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="RUN|MODEL", help="A model to compare with; the first is a gate's base."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            metavar="NAME,…",
            help="What to measure, in place of what fits the items: names, FILE.py:name, module:name, and last "
            "regex:PATTERN. May be given several times.",
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN", help="Figures by the values of a column, too; site is the file."),
    ] = None,
    suppress_below: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tell no figures of groups with fewer items than that.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first so many items alone.")] = None,
    chat: Chat = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each item, at a temperature above 0.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Where a loss cuts records. Unset: at the first run's training.max_length."),
    ] = None,
    reward: Annotated[
        Path | None, typer.Option("--reward", metavar="RUN", help="A reward model that scores the answers, too.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", metavar="RUN|MODEL", help="A local model that judges by rubrics.")
    ] = None,
    gates: Annotated[
        Path | None, typer.Option("--gates", metavar="FILE", help="What must be reached; exit code 1 where it is not.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="The gates' outcome as JUnit XML.")
    ] = None,
    overlap: Annotated[
        bool, typer.Option("--overlap/--no-overlap", help="Look for the items in the runs' training records.")
    ] = True,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="Folder of answers.jsonl, results.json and report.html. Unset: evaluations/RUN-TASK beside the "
            "first run, or evaluations/MODEL-DIGEST-TASK here, by the model's place. Answers that are there "
            "already are not asked for again.",
        ),
    ] = None,
    evidently: Annotated[
        Path | None,
        typer.Option("--evidently", metavar="DIR", help="New folder for Evidently's report on the answers."),
    ] = None,
    evidently_tests: Annotated[
        list[str] | None,
        typer.Option(
            "--evidently-test",
            metavar="TEST",
            help="What must hold there, as 'exact_match >= base + 0.02' or 'drift.length <= 0.1'; exit code 1 where it "
            "does not. May be given several times.",
        ),
    ] = None,
    evidently_env: Annotated[
        Path | None,
        typer.Option("--evidently-env", metavar="DIR", help="Evidently's environment; made where there is none."),
    ] = None,
    promptfoo: Annotated[
        Path | None,
        typer.Option(
            "--promptfoo", metavar="DIR", help="New folder for promptfoo's suite of the answers, and results."
        ),
    ] = None,
    promptfoo_checks: Annotated[
        list[str] | None,
        typer.Option(
            "--promptfoo-check",
            metavar="CHECK",
            help="contains, exact_match, 'rouge_1 >= 0.5', regex:PATTERN, FILE.py:name. Unset: what fits the metrics.",
        ),
    ] = None,
    promptfoo_asks: Annotated[
        bool,
        typer.Option("--promptfoo-asks", help="Have promptfoo load and ask the models, not take the kept answers."),
    ] = False,
    promptfoo_env: Annotated[
        Path | None,
        typer.Option("--promptfoo-env", metavar="DIR", help="promptfoo's environment; made where there is none."),
    ] = None,
    base: Base = None,
    site: Site = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate runs and models: loss, multiple choice, answers in words, each figure with a 95 % interval."""
    from evaluation.figures.gates import junit as as_junit
    from evaluation.figures.gates import read_gates, tried
    from evaluation.figures.results import Grouping, check_columns
    from evaluation.items import Sampling
    from evaluation.running import Settings
    from evaluation.running import evaluate as carry_out
    from evaluation.tasks.loading import load_tasks

    if junit is not None and gates is None:
        raise InputError("--junit: it is the outcome of gates; name their file with --gates")
    if samples > 1 and temperature == 0:
        raise InputError(f"--samples {samples}: at temperature 0 all are the same; set --temperature")
    wanted_gates = read_gates(gates) if gates is not None else None
    others = against or []
    if wanted_gates is not None and wanted_gates.need_base and not others:
        raise InputError("--gates: a gate is held against base; name that model with --against")
    tasks = load_tasks(
        on, models, "--on", metrics=_metrics(metrics or []), limit=limit, chat=chat, reward=reward is not None
    )
    columns = list(by or [])
    if wanted_gates is not None:
        wanted_gates.check(tasks)
        columns += wanted_gates.columns
    folder = to or usual_folder("evaluations", models[0], tasks)
    settings = Settings(
        Sampling(max_tokens, temperature, samples, seed),
        Grouping(tuple(columns), suppress_below),
        max_length=max_length,
        base=base,
        site=site,
        reward=reward,
        judge=judge,
        overlap=overlap,
    )
    check_columns(tasks, columns, "--by ")
    asked = Asked(
        evidently,
        tuple(evidently_tests or ()),
        evidently_env,
        promptfoo,
        tuple(promptfoo_checks or ()),
        promptfoo_env,
        Loaded(base, site, max_tokens) if promptfoo_asks else None,
    ).ready(models, others, tasks, lambda words: stderr.print(printable(words), soft_wrap=True))
    left = f"interrupted; the answers so far are in {folder}, and the same command goes on from them"
    with saying(lambda: left), results_only_on_stdout(), progress_bars(quiet=quiet) as on_progress:
        found = carry_out(models, tasks, settings, folder, on_progress, others)
    verdicts = tried(wanted_gates, found.results, models, others[0] if others else None) if wanted_gates else []
    outside, broken = _outside(bridged(asked, models, others, tasks, found.folder))
    _tell(found, verdicts, outside, as_json=as_json, quiet=quiet)
    if junit is not None:
        from core_training.foundation.durable import commit_file

        commit_file(junit, as_junit(verdicts))
    if failed := [one for one in verdicts if not one.passed]:
        said = "; ".join(f"{one.model}: {one.words}" for one in failed[:3])
        raise RunError(f"{len(failed)} of {len(verdicts)} gates failed: {said}")
    if broken is not None:
        raise broken
    if outside.failed:
        raise RunError(f"{len(outside.failed)} of Evidently's named tests failed: {'; '.join(outside.failed[:3])}")


def _outside(parts: Iterator[Bridged]) -> tuple[Bridged, FedloomError | None]:
    """What other programs said of the answers, all in one, and why they said no more: what is there is told first."""
    whole = Bridged()
    try:
        for part in parts:
            for key, documents in part.document.items():
                whole.document.setdefault(key, []).extend(documents)
            whole.lines += part.lines
            whole.failed += part.failed
    except FedloomError as error:
        return whole, error
    return whole, None


def _metrics(listed: list[str]) -> tuple[str, ...]:
    """The names; a pattern, which may have commas of its own, reaches to the end of its option."""
    names = []
    for one in listed:
        plain, pattern, rest = one.partition("regex:")
        names += [name for part in plain.split(",") if (name := part.strip())]
        names += [pattern + rest] if pattern else []
    return tuple(names)


def _tell(found: Evaluation, verdicts: list[Verdict], outside: Bridged, *, as_json: bool, quiet: bool) -> None:
    """Write results and report, and tell them."""
    from core_training.foundation.durable import commit_json
    from fedloom.evaluation_page import write_report

    document = found.document() | outside.document
    if verdicts:
        document["gates"] = [one.document() for one in verdicts]
    commit_json(found.folder / RESULTS, document)
    report = write_report(found, verdicts)
    for note in found.notes:
        stderr.print(printable(note), soft_wrap=True)
    if as_json:
        typer.echo(strict_json(document))
        return
    if quiet:
        return
    for task in dict.fromkeys(result.task for result in found.results):
        _print_task(found, task)
    _print_comparisons(found)
    for one in verdicts:
        stderr.print(printable(f"{'passed' if one.passed else 'FAILED'}: {one.model}: {one.words}"), soft_wrap=True)
    for line in outside.lines:
        stderr.print(printable(line), soft_wrap=True)
    stderr.print(printable(f"wrote {report}"), soft_wrap=True)


def _print_task(found: Evaluation, task: str) -> None:
    from rich.table import Table

    from fedloom.evaluation_page import figure_rows, names_of

    results = [result for result in found.results if result.task == task]
    names = names_of(results)
    shown = Table(title=printable(f"{task} · {results[0].document['n']} items"), title_justify="left")
    shown.add_column("")
    for result in results:
        shown.add_column(printable(names[result.model]), justify="right", overflow="fold")
    for row in figure_rows(results):
        shown.add_row(*map(printable, row))
    console().print(shown)
    for result in results:
        told = [*result.document["notes"], *(f"{n} records {what}" for what, n in result.document["left_out"].items())]
        for note in told:
            stderr.print(printable(f"{names[result.model]}: {note}"), soft_wrap=True)


def _print_comparisons(found: Evaluation) -> None:
    from fedloom.evaluation_page import names_of, shown

    names = names_of(found.results)
    for one in found.comparisons:
        gap = shown({"value": one.difference.value, "low": one.difference.low, "high": one.difference.high})
        pair = f"{names[one.model]} − {names[one.against]}"
        words = f"{one.task}: {one.metric}: {pair}: {gap}"
        if not math.isnan(one.difference.p):
            words += f", p {one.difference.p:.3g}, by Holm {one.adjusted:.3g}"
        console().print(printable(words), soft_wrap=True)
