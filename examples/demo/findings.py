"""The demo's results for people: the table on the terminal, the page, and its picture."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from core_training.recipe.reading import load_recipe
from examples.demo.examiner import Marks
from examples.demo.story import FOLDER, RECIPE, Findings
from fedloom.console import stderr
from fedloom.report import Curve, Entry, Report, read_entry, write_picture, write_report


def show(findings: Findings) -> None:
    """Print the table."""
    hospitals = list(findings.alone)
    table = Table(title="The questions of all hospitals, answered word for word", title_justify="left")
    table.add_column("trained")
    for column in ("loss", "all", *hospitals):
        table.add_column(column, justify="right")
    for label, marks in _rows(findings).items():
        shares = [marks.accuracy, *(marks.hospitals[name].accuracy for name in hospitals)]
        style = "bold" if label in ("federated", "gossip") else ""
        table.add_row(label, f"{marks.eval_loss:.3f}", *(f"{share:.1%}" for share in shares), style=style)
    stderr.print(table)
    stderr.print(f"{findings.seconds:.0f} s. Open {FOLDER / 'report.html'}; all figures: {FOLDER / 'summary.json'}")


def publish(findings: Findings) -> None:
    """Write `report.html` and its picture, `report.png`, into the demo's folder."""
    report = _report(findings)
    write_report(report, FOLDER / "report.html")
    write_picture(report, FOLDER / "report.png")


def _rows(findings: Findings) -> dict[str, Marks]:
    return {
        "before": findings.base,
        **{f"{name} alone": marks for name, marks in findings.alone.items()},
        "alone, on average": findings.local_only,
        **findings.shared,
    }


def _report(findings: Findings) -> Report:
    rows = _rows(findings)
    entries = [_entry(findings, label, marks) for label, marks in rows.items()]
    bars = {entry.label: entry.by_group for entry in entries if entry.label not in ("before", "alone, on average")}
    recipe = load_recipe(RECIPE)
    steps = (recipe.topology.rounds or 0) * (recipe.topology.local_steps or 0)
    count = len(findings.alone)
    return Report(
        title="Three hospitals, one recipe, four ways of training",
        paragraphs=(
            "Everything here is synthetic: an invented world in which each hospital knows diseases that the others "
            "have never heard of. None of its diseases, tests or drugs exists.",
            f"One small base model, pre-trained on the spot, learns from one recipe. A hospital takes {steps} steps on "
            "its own records, whether it trains alone, with a server (federated) or with its peers (gossip). Central "
            f"training, for which all records would have to be in one place, takes {count} × {steps} steps on the "
            "joined data, so it sees as many examples as the hospitals do together.",
            "Every model is then asked the questions of all hospitals, in phrasings that no model was trained on. An "
            f"answer counts when it is right word for word. For example: “{findings.example.prompt}” – "
            f"“{findings.example.completion}”",
            "A hospital that trains alone answers its own questions and guesses at the rest. Federated and gossip "
            "learn what all three know, while no record leaves its hospital: only adapters travel, and they travel "
            "masked, so that nobody learns more than their sum. With all peers in one group, gossip computes the same "
            "mean as the server, so the two agree.",
        ),
        entries=entries,
        bars=bars,
        commands=_commands(findings, count * steps),
    )


def _entry(findings: Findings, label: str, marks: Marks) -> Entry:
    by_group = {name: part.accuracy for name, part in marks.hospitals.items()}
    nothing = Curve((), ())
    if label == "before":
        return Entry(label, nothing, marks.eval_loss, marks.accuracy, None, None, None, by_group)
    single = label in findings.folders
    folders = [findings.folders[label]] if single else [findings.folders[f"{name} alone"] for name in findings.alone]
    entry = read_entry(label, *folders)
    # One line for the hospitals alone is enough in the picture: the average.
    curve = nothing if label.endswith(" alone") else entry.curve
    return replace(entry, curve=curve, eval_loss=marks.eval_loss, accuracy=marks.accuracy, by_group=by_group)


def _commands(findings: Findings, central_steps: int) -> list[str]:
    recipe = RECIPE.relative_to(RECIPE.parents[2])
    runs = {
        **{
            f"alone-{name}": f"train {recipe} data.train={FOLDER}/world/data/{name}.jsonl.gz" for name in findings.alone
        },
        "federated": f"simulate {recipe} topology.kind=federated",
        "gossip": f"simulate {recipe} topology.kind=gossip",
        "central": f"train {recipe} training.max_steps={central_steps}",
    }
    return [
        "make demo",
        "",
        "# The single runs again, with the world and the base model that the demo made. One thread, as in the demo,",
        "# gives the same figures to the last digit.",
        "export OMP_NUM_THREADS=1",
        *(f"fedloom {command} --out runs/{name}" for name, command in runs.items()),
    ]
