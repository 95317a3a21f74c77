"""How much longer a secure round takes than a plain one with the same codec, over real processes with TLS.

A SuperLink and three sites on this machine, each with SuperNode and worker; all weights of a model of ten
million parameters travel in the 16-bit ring. The sites train for about 20 seconds a round. Runs with and without masks
take turns. A round lasts from the end of the one before it to its own end; what it takes beside the slowest site's
training is compared, relative to a whole plain round, so that the training's own ups and downs do not count. Masks are
set up before the first round, for 16 rounds at a time: a sixteenth of that is added. The first round, which alone is
evaluated, is not counted.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.federation.deployed import deployed, moment, run_to_the_end
from benchmarks.figure import Figure
from benchmarks.places import Places
from server.federation import Federation
from server.secure_rounds import ROUNDS_AHEAD

TARGET = 10.0
TRAINING_SECONDS = 20.0
PAIRS = 2
ROUNDS = 4
SITES = ("cdc", "nhlbi", "niddk")
LAYERS = 13
"""Of the base model's width: 10.6 million parameters."""


@dataclass
class _Runs:
    """The runs of one kind: for every round but the first, its seconds and those of its slowest site's training."""

    masked: bool
    total: list[float] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    setup: list[float] = field(default_factory=list)

    @property
    def other(self) -> list[float]:
        return [total - training for total, training in zip(self.total, self.training, strict=True)]

    def add(self, federation: Federation, recipe: Path, rounds: int, steps: int) -> None:
        """Run once more."""
        privacy = ["privacy.codec=ring16", f"privacy.secure_aggregation={str(self.masked).lower()}"]
        overrides = [*privacy, f"topology.rounds={rounds}", f"topology.local_steps={steps}"]
        run = run_to_the_end(federation, recipe, len(SITES), *overrides)
        events = list(run.lines("round"))
        for before, this in pairwise(events):
            self.total.append((moment(this) - moment(before)).total_seconds())
            self.training.append(max(site["seconds"] for site in this["sites"].values()))
        self.setup += [event["seconds"] for event in run.lines("masks_set_up")]


def measure(places: Places) -> Figure:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the sites share this machine's cores
    plain, secure = _Runs(masked=False), _Runs(masked=True)
    learning = ("tuning.mode=full", "training.learning_rate=1e-4", "data.eval_fraction=0.02")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = _make_model(places.model, folder / "model")
        records = {name: places.sites[name] for name in SITES}
        federation, recipe = stack.enter_context(deployed(folder, places, records, model, *learning))
        trial = _Runs(masked=False)
        trial.add(federation, recipe, rounds=2, steps=2)
        steps = max(1, round(TRAINING_SECONDS / (trial.training[-1] / 2)))
        for _ in range(PAIRS):
            plain.add(federation, recipe, ROUNDS, steps)
            secure.add(federation, recipe, ROUNDS, steps)
    extra = statistics.median(secure.other) - statistics.median(plain.other)
    setup = statistics.median(secure.setup) / ROUNDS_AHEAD
    return Figure(
        name="secure_round",
        meaning="what a secure round takes longer, relative to a plain round with the same codec",
        value=100 * (extra + setup) / statistics.median(plain.total),
        unit="%",
        target=TARGET,
        details={
            "sites": len(SITES),
            "steps_per_site_and_round": steps,
            "seconds_longer": extra + setup,
            "training_seconds": {"plain": plain.training, "secure": secure.training},
            "other_seconds": {"plain": plain.other, "secure": secure.other},
            "setup_seconds": secure.setup,
        },
    )


def _make_model(base: Path, folder: Path) -> Path:
    """A deeper model of the base model's kind, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(base, num_hidden_layers=LAYERS)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
