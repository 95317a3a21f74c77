"""Six real sites, one recipe: the loss on every site's held-out part before, alone, federated, gossip and central.

Each site takes the recipe's rounds × local_steps optimizer steps on its own records, alone as well as with the others;
central training takes as many steps as all sites together, so it sees as many examples. Every model is then evaluated
on every site's held-out part; "alone" is the mean over the six models that six sites would have.

Runs that `runs/bench/medquad` holds already, completed and of the same recipe, are not run again: remove the folder to
start afresh.
"""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_centrally, trained_together
from benchmarks.places import OUTPUT, Places
from examples.demo.examiner import Examiner, Marks, average
from fedloom.console import stderr, ticking

FOLDER = OUTPUT / "medquad"


def measure(places: Places) -> Figure:
    alone = {name: _train_alone(places, name) for name in places.sites}
    together = {kind: trained_together(places.recipe(name=kind), FOLDER / kind) for kind in ("federated", "gossip")}
    central = trained_centrally(places.recipe(name="central"), FOLDER / "central")
    examiner = Examiner(places.recipe(name="central"))
    with ticking("evaluating", "model") as ticker:
        models = [*alone.values(), *together.values(), central]
        before = examiner.examine_base()
        marks = []
        for done, run in enumerate(models, start=1):
            marks.append(examiner.examine(run / "adapter"))
            ticker.advance(done, len(models))
    examiner.close()
    of_alone = dict(zip(alone, marks, strict=False))
    rows = {
        "before": before,
        "alone": average(list(of_alone.values())),
        **dict(zip([*together, "central"], marks[len(alone) :], strict=True)),
    }
    losses = {label: _losses(row) for label, row in rows.items()}
    losses["alone, own site"] = _own(of_alone)
    stderr.print(_table(losses))
    return Figure(
        name="medquad",
        meaning="held-out loss of all sites: federated less alone",
        value=rows["federated"].eval_loss - rows["alone"].eval_loss,
        unit="nats per token",
        target=0.0,
        details={
            "losses": losses,
            "each_alone": {f"{name} alone": _losses(row) for name, row in of_alone.items()},
        },
    )


def _train_alone(places: Places, name: str) -> Path:
    """One site with nobody's records but its own, for its share of the steps."""
    recipe = places.recipe(f"data.train={places.sites[name]}", name="central")
    steps = (recipe.topology.rounds or 0) * (recipe.topology.local_steps or 0)
    training = recipe.training.model_copy(update={"max_steps": steps})
    return trained_centrally(recipe.model_copy(update={"training": training}), FOLDER / f"alone-{name}")


def _own(alone: dict[str, Marks]) -> dict[str, float]:
    """What each site's own model reaches on the site's own part: what a site gets if it looks no further."""
    own = {name: marks.hospitals[name].eval_loss for name, marks in alone.items()}
    return {**own, "mean of sites": sum(own.values()) / len(own)}


def _losses(marks: Marks) -> dict[str, float]:
    return {
        **{name: part.eval_loss for name, part in marks.hospitals.items()},
        "mean of sites": average(list(marks.hospitals.values())).eval_loss,
        "all tokens": marks.eval_loss,
    }


def _table(losses: dict[str, dict[str, float]]) -> Table:
    columns = list(losses["before"])
    table = Table(title="Loss on the sites' held-out parts (nats per token)", title_justify="left", box=None)
    table.add_column("trained", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", min_width=5, overflow="fold")
    for label, row in losses.items():
        table.add_row(label, *(f"{row[column]:.3f}" if column in row else "–" for column in columns))
    return table
