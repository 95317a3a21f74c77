"""Parts of other packages: found by their entry point, and trained with as if they were fedloom's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny

pytestmark = pytest.mark.slow

LIGHT = '''
from dataclasses import dataclass, replace

from pydantic import Field

from core_training.parts.aggregation_rules import AggregationPart
from core_training.parts.codecs.codec_part import CodecPart
from core_training.parts.data_kinds import DataKind
from core_training.parts.mixing_rules import MixingPart
from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart
from core_training.parts.tuning_modes.tuning_part import TuningPart


@dataclass(frozen=True)
class Exchange:
    asked: str
    answered: str

    @property
    def identity(self):
        return {"asked": self.asked, "answered": self.answered}


EXCHANGE = DataKind[Section](name="exchange", target="their_work:LAYOUTS")


class Smooth(Section):
    """Stage `smooth`: fine-tuning with smoothed labels."""

    smoothing: float = Field(0.1, description="Share of the loss that is the same for all tokens.")


SMOOTH = StagePart[Smooth](
    name="smooth",
    target="their_work:SmoothStage",
    settings=Smooth,
    reads=EXCHANGE,
    unit="tokens",
    learning_rate=2e-5,
    adapter_learning_rate=1e-2,
)
DATA = replace(SMOOTH, name="data")

SCALES = TuningPart[Section](
    name="scales", target="their_work:Scales", trains=lambda tuning: "the scales of the norms", result="layers"
)


class Middle(Section):
    """The middle of the sites' values."""

    least: int = Field(1, description="Sites below which there is no middle.")


MIDDLE = AggregationPart[Middle](name="middle", target="their_work:MiddleRule", settings=Middle)
TURNS = MixingPart[Section](name="turns", target="their_work:Turns")


class Lean(Section):
    """Some of the way before the mean."""

    share: float = Field(0.5, description="Of the way before.")


LEAN = OuterStepPart[Lean](name="lean", target="their_work:LeanStep", settings=Lean)
HALF = CodecPart[Section](name="half", target="their_work:Half", sends_change=False)
'''

ENTRIES = """[fedloom.stages]
smooth = their_parts:SMOOTH
[fedloom.data_kinds]
exchange = their_parts:EXCHANGE
[fedloom.tuning_modes]
scales = their_parts:SCALES
[fedloom.aggregation_rules]
middle = their_parts:MIDDLE
[fedloom.mixing_rules]
turns = their_parts:TURNS
[fedloom.outer_steps]
lean = their_parts:LEAN
[fedloom.codecs]
half = their_parts:HALF
"""

WORK = """
import numpy as np
import torch.nn.functional as F

from core_training.data.examples import Example
from core_training.data.layout import Layout
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import TrainableState
from core_training.stages.base import BatchLoss
from core_training.stages.chat import answer_tokens
from core_training.stages.language import LanguageStage, labelled_logits
from core_training.tuning.base import TuningMode
from strategies.codec import StateCodec
from strategies.mixing import weighted_mean
from their_parts import SMOOTH, Exchange

LAYOUTS = (Layout(("question", "answer"), lambda raw: Exchange(raw["question"], raw["answer"])),)


class Scales(TuningMode):
    def apply(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "norm" in name
        return model


class MiddleRule:
    def __init__(self, manifest, settings):
        self.manifest, self.settings, self.states = manifest, settings, []

    def add(self, state, weight):
        self.states.append(state.buffer)

    def result(self):
        if len(self.states) < self.settings.least:
            raise ProtocolError(f"{len(self.states)} sites have no middle")
        return TrainableState(self.manifest, np.median(np.stack(self.states), axis=0).astype(np.float32))


class Turns:
    def partners(self, name, roster, graph):
        return tuple(member for member in roster if member != name)

    def mix(self, own, others, roster):
        return weighted_mean([own.state, *(other.state for other in others)], [2.0] + [1.0] * len(others))


class LeanStep:
    remembers = {"before": 0.0}

    def __init__(self, outer, settings):
        self.rate, self.share = outer.rate, settings.share

    def step(self, start, mean, memory):
        change = mean - start
        return start + self.rate * (change + self.share * memory["before"]), {"before": change}


class Half(StateCodec):
    def write(self, trained, start, key):
        return trained.buffer.astype("<f2").tobytes()

    def read(self, payload, start):
        values = np.frombuffer(payload, dtype="<f2")
        if values.size != self.manifest.size:
            raise ProtocolError("an update of another size")
        return TrainableState(self.manifest, values.astype(np.float32))


class SmoothStage(LanguageStage[Exchange]):
    def tokenise(self, record, values):
        turns = [{"role": "user", "content": values.asked}], [{"role": "assistant", "content": values.answered}]
        return Example((answer_tokens(*turns, self.base, record),))

    def loss(self, model, batch):
        logits, labels = labelled_logits(model, batch)
        smoothing = self.recipe.settings(SMOOTH).smoothing
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
        tokens = (labels != -100).sum()
        return BatchLoss(total, tokens, tokens)
"""


def install(folder: Path, entries: str) -> Path:
    """Leave in `folder` what pip would: two modules, and the metadata that names the parts."""
    (folder / "their_parts.py").write_text(LIGHT, encoding="utf-8")
    (folder / "their_work.py").write_text(WORK, encoding="utf-8")
    metadata = folder / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(entries, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("theirs"), ENTRIES)


def fedloom(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, with the package on the path."""
    return python(package, "-m", "fedloom.cli", *words)


def python(package: Path, *words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    """Python, with the package on the path."""
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
    root, environment = Path(__file__).parents[1], {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words], input=said, capture_output=True, text=True, cwd=root, env=environment, timeout=250
    )


def write_recipe(folder: Path, **sections: Any) -> str:
    model = tiny.make_model(folder / "model")
    sites = [str(tiny.write_jsonl(folder / f"site-{n}.jsonl", tiny.questions(n, 24))) for n in (1, 2)]
    recipe = {
        "model": {"name_or_path": str(model)},
        "stage": "smooth",
        "data": {"eval_fraction": 0.3},
        "simulation": {"sites": sites},
        "output": str(folder / "run"),
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("kind", "command"), [("central", "train"), ("federated", "simulate"), ("gossip", "simulate")])
def test_a_stage_of_another_package_trains_in_every_topology(
    package: Path, tmp_path: Path, kind: str, command: str
) -> None:
    recipe = write_recipe(
        tmp_path,
        smooth={"smoothing": 0.2},
        topology={"kind": kind, "rounds": 2, "local_steps": 3},
        privacy={"codec": "ring16"},
    )
    done = fedloom(package, command, recipe, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["stage"] == "smooth"
    assert summary["train_loss_last"] < summary["train_loss_first"]
    assert summary["eval_loss"] < summary["eval_loss_initial"]


OF_ANOTHER_PACKAGE: dict[str, dict[str, Any]] = {
    "a tuning mode": {"tuning": {"mode": "scales"}, "training": {"learning_rate": 1e-2}},
    "a codec": {"privacy": {"codec": "half"}},
    "an aggregation rule": {"aggregation": {"rule": "middle", "middle": {"least": 2}}},
    "a mixing rule": {"aggregation": {"mixing": "turns"}},
}


ALL_OF_THEM = """
import contextlib, io, json, sys
from fedloom import cli
cli.leave = sys.exit
told = {}
for name, words in json.load(sys.stdin).items():
    sys.argv = ["fedloom", *words]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, (name, end.code)
    told[name] = json.loads(said.getvalue())
print(json.dumps(told))
"""
COMMANDS = {"central": "train", "federated": "simulate", "gossip": "simulate"}


@pytest.fixture(scope="module")
def taken_part(package: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summaries of runs with each kind of part in each topology, by one process: to start it takes longest."""
    words = {}
    for part, sections in OF_ANOTHER_PACKAGE.items():
        for kind, command in COMMANDS.items():
            topology = {"kind": kind, "rounds": 2, "local_steps": 3}
            recipe = write_recipe(tmp_path_factory.mktemp("run"), topology=topology, **sections)
            words[f"{part}, {kind}"] = [command, recipe, "--json"]
    done = python(package, "-c", ALL_OF_THEM, said=json.dumps(words))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("part", OF_ANOTHER_PACKAGE)
def test_every_kind_of_part_of_another_package_takes_part_in_every_topology(
    taken_part: dict[str, Any], part: str, kind: str
) -> None:
    summary = taken_part[f"{part}, {kind}"]
    assert summary["eval_loss"] < summary["eval_loss_initial"]


def test_an_outer_step_of_another_package_is_taken_by_the_server(package: Path, tmp_path: Path) -> None:
    topology = {"kind": "federated", "rounds": 2, "local_steps": 3}
    outer = {"step": "lean", "lean": {"share": 0.25}}
    recipe = write_recipe(tmp_path, topology=topology, aggregation={"outer": outer})
    done = fedloom(package, "simulate", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval_loss"] < json.loads(done.stdout)["eval_loss_initial"]
    assert (tmp_path / "run" / "checkpoints" / "round-000002" / "outer-before.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "aggregation", "expected"),
    [
        ("federated", {"rule": "middle"}, "rule 'middle' needs each site's state by itself; choose rule 'fedavg'"),
        ("gossip", {"mixing": "turns"}, "mixing 'turns' needs each neighbour's state by itself"),
    ],
)
def test_a_rule_that_needs_each_state_meets_no_ring(
    package: Path, tmp_path: Path, kind: str, aggregation: Any, expected: str
) -> None:
    topology = {"kind": kind, "rounds": 2, "local_steps": 3}
    recipe = write_recipe(tmp_path, topology=topology, aggregation=aggregation, privacy={"codec": "ring16"})
    done = fedloom(package, "recipe", "check", recipe)
    assert done.returncode == 2
    assert expected in done.stderr


def test_a_recipe_is_checked_and_begun_with_the_keys_of_another_packages_stage(package: Path, tmp_path: Path) -> None:
    wrong = fedloom(package, "recipe", "check", write_recipe(tmp_path, smooth={"smothing": 0.2}))
    assert wrong.returncode == 2
    assert "smooth.smothing: unknown key; did you mean 'smoothing'?" in wrong.stderr
    begun = fedloom(package, "recipe", "new", "--stage", "smooth")
    assert "smoothing: 0.1  # Share of the loss" in begun.stdout, begun.stderr
    shown = fedloom(package, "recipe", "schema", "--markdown")
    assert "| `smoothing` | float |" in shown.stdout


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("any = their_parts:SMOOTH", None),
        ("first = their_parts:SMOOTH\nsecond = their_parts:SMOOTH", "'second' of fedloom.stages"),
        ("smooth = their_parts:NOTHING", "cannot be loaded: AttributeError"),
        ("smooth = their_parts:Smooth", "has to be a StagePart"),
        ("smooth = their_parts:EXCHANGE", "has to be a StagePart"),
        ("smooth = their_parts:DATA", "cannot be called 'data': a name is"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(tmp_path: Path, entry: str, said: str | None) -> None:
    done = fedloom(install(tmp_path, f"[fedloom.stages]\n{entry}\n"), "recipe", "check", write_recipe(tmp_path))
    assert done.returncode == (0 if said is None else 2), done.stderr
    assert said is None or (said in done.stderr and "Traceback" not in done.stderr)
