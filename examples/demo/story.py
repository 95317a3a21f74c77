"""The demo from beginning to end: the world, the base model, four ways of training one recipe, and who learnt what.

The protocol, the same for all:
- One base model, one recipe, one seed. Every hospital takes the same number of optimizer steps on its own records,
  whether it trains alone, in the federation or in the gossip group. Central training, which would need all records in
  one place, takes as many steps on the joined data as the three hospitals take together: it sees as many examples.
- Nobody trains on the questions asked in the end. They are phrasings, kept apart for each fact, of what the hospitals
  teach; every model is asked those of all hospitals. (That each evaluation reads all three files is for measuring
  alone; in a real federation a site evaluates on its own.)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core_training.distributed.launch import opened_engine
from core_training.engine.central import train
from core_training.foundation.durable import commit_file
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from examples.demo.base_model import make_base_model
from examples.demo.examiner import Examiner, Marks, average
from examples.demo.world import Question, World, invent, write
from fedloom.console import stderr, ticking
from simulations import simulate

RECIPE = Path(__file__).with_name("recipe.yaml")
FOLDER = Path("runs/demo")  # the recipe's own paths lie in it, too
SEED = 1


@dataclass(frozen=True)
class Findings:
    """What came out: marks on the questions of all hospitals, where the runs' folders are, and one of the questions."""

    example: Question
    base: Marks
    alone: dict[str, Marks]
    shared: dict[str, Marks]
    folders: dict[str, Path]
    seconds: float

    @property
    def local_only(self) -> Marks:
        return average(list(self.alone.values()))


def tell(overrides: Sequence[str] = (), pretraining: Sequence[str] = ()) -> Findings:
    """Run the demo in `runs/demo`, replacing what an earlier one left there; the arguments override its two recipes."""
    import torch

    # A second thread would gain nothing for a model this small, and the figures would hang on the number of cores.
    torch.set_num_threads(1)
    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    world = invent(SEED)
    write(world, FOLDER / "world")
    names = [hospital.name for hospital in world.hospitals]
    _say(f"An invented world: {len(names)} hospitals, each with diseases of its own. All of it is synthetic.")
    make_base_model(world, FOLDER / "base", list(pretraining))

    folders = {f"{name} alone": _train_alone(name, overrides) for name in names}
    folders["federated"] = _train_together("federated", overrides)
    folders["gossip"] = _train_together("gossip", overrides)
    folders["central"] = _train_centrally(world, overrides)

    with ticking("asking all models", "model") as ticker:
        examiner = Examiner(_recipe("central", overrides))
        base = examiner.examine_base()
        marks = {}
        for done, (label, folder) in enumerate(folders.items(), start=1):
            marks[label] = average([examiner.examine(adapter) for adapter in _adapters(folder)])
            ticker.advance(done, len(folders))
        examiner.close()
    alone = {name: marks[f"{name} alone"] for name in names}
    shared = {way: marks[way] for way in ("federated", "gossip", "central")}
    findings = Findings(world.hospitals[0].held_out[0], base, alone, shared, folders, time.perf_counter() - began)
    commit_file(FOLDER / "summary.json", (json.dumps(summary_of(findings), indent=2) + "\n").encode())
    return findings


def summary_of(findings: Findings) -> dict[str, Any]:
    """`summary.json`: loss and accuracy on all hospitals' questions, each hospital's, and the final states' digests."""

    def digest(label: str) -> Any:
        return (RunFolder(findings.folders[label]).summary() or {}).get("state_digest")

    models = {
        name: {**asdict(marks), "state_digest": digest(f"{name} alone")} for name, marks in findings.alone.items()
    }
    return {
        "schema": 1,
        "seed": SEED,
        "seconds": findings.seconds,
        "base": asdict(findings.base),
        "local_only": {**asdict(findings.local_only), "models": models},
        **{way: {**asdict(marks), "state_digest": digest(way)} for way, marks in findings.shared.items()},
    }


def _train_alone(name: str, overrides: Sequence[str]) -> Path:
    """One hospital with nobody's records but its own."""
    recipe = _recipe("central", [*overrides, f"data.train={FOLDER}/world/data/{name}.jsonl.gz"])
    return _train(recipe, f"alone-{name}", f"{name} hospital, alone")


def _train_centrally(world: World, overrides: Sequence[str]) -> Path:
    """All records in one place, for as many steps as all hospitals take together."""
    recipe = _recipe("central", overrides)
    steps = len(world.hospitals) * (recipe.total_steps or 0)
    return _train(_recipe("central", [*overrides, f"training.max_steps={steps}"]), "central", "central, on all records")


def _train(recipe: Recipe, name: str, label: str) -> Path:
    folder = RunFolder(FOLDER / name)
    with opened_engine(recipe) as engine, ticking(label, "step") as ticker:
        folder.prepare(recipe, resume=False)
        train(recipe, engine, folder, ticker.advance)
    return folder.path


def _train_together(kind: str, overrides: Sequence[str]) -> Path:
    """The records stay where they are, and what the hospitals learn travels: over a server, or between them."""
    recipe = _recipe(kind, overrides)
    rounds = recipe.topology.rounds or 0
    with ticking(f"{kind}, three hospitals", "round") as ticker:

        def on_round(number: int, loss: float | None) -> None:
            ticker.advance(number, rounds, f"loss {loss:.3f}" if loss is not None else "")

        simulate(recipe, RunFolder(FOLDER / kind), on_round)
    return FOLDER / kind


def _recipe(kind: str, overrides: Sequence[str]) -> Recipe:
    return load_recipe(RECIPE, [f"topology.kind={kind}", *overrides])


def _adapters(run: Path) -> list[Path]:
    """The run's result; in a gossip run every node has its own."""
    return [run / "adapter"] if (run / "adapter").is_dir() else sorted((run / "sites").glob("**/adapter"))


def _say(text: str) -> None:
    stderr.print(text, soft_wrap=True)
