"""The cells of the matrix: which fault strikes which component at which point, in which kind of run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from tests.faults.small_disk import can_mount


@dataclass(frozen=True)
class Cell:
    """One fault at one point of a round in one component."""

    topology: str
    masked: bool
    component: str
    point: str
    fault: str

    @property
    def name(self) -> str:
        mode = "masked" if self.masked else "plain"
        return f"{self.topology} {mode}: {self.component}, {self.point}, {self.fault}"


_OF_A_SERVER = ("superlink", "serverapp", "superexec", "server")
_OF_A_SITE = ("site", "supernode", "worker")
_MACHINES = ("server machine", "site machine")
_ON_THE_LINE = ("cut", "delayed", "duplicated")


def _cells(topology: str, *, masked: bool, plan: list[tuple[tuple[str, ...], str, tuple[str, ...]]]) -> list[Cell]:
    return [
        Cell(topology, masked, component, point, fault)
        for components, fault, points in plan
        for point, component in product(points, components)
    ]


def _lines(*points: str, line: str = "line") -> list[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    return [((line,), fault, points) for fault in _ON_THE_LINE]


_ALL = [
    *_cells(
        "federated",
        masked=False,
        plan=[
            (
                (*_OF_A_SERVER, *_OF_A_SITE, *_MACHINES),
                "kill",
                ("joining", "training", "uploading", "committing", "evaluating"),
            ),
            (("serverapp", "superlink", "server machine", "site machine"), "kill", ("between", "ending")),
            ((*_OF_A_SERVER, *_OF_A_SITE), "stop 20 s", ("training",)),
            (("serverapp", "superlink", "supernode", "worker"), "stop 20 s", ("evaluating",)),
            (("federation", "north"), "disk full", ("joining", "training", "uploading", "evaluating")),
            (_MACHINES, "clock jump", ("joining", "training", "uploading", "evaluating")),
            *_lines("joining", "training", "uploading", "committing", "evaluating"),
        ],
    ),
    *_cells(
        "federated",
        masked=True,
        plan=[
            (
                ("serverapp", "superlink", "supernode", "worker", *_MACHINES),
                "kill",
                ("masking", "training", "uploading", "opening"),
            ),
            (("serverapp", "worker"), "stop 20 s", ("masking", "uploading")),
            (("federation", "north"), "disk full", ("masking", "uploading", "opening")),
            (_MACHINES, "clock jump", ("masking", "uploading")),
            *_lines("masking", "uploading", "opening"),
        ],
    ),
    *_cells(
        "gossip",
        masked=False,
        plan=[
            (("node", "worker"), "kill", ("joining", "training", "exchanging", "committing", "evaluating")),
            (("node",), "kill", ("ending",)),
            (("node machine",), "kill", ("training", "evaluating")),
            (("node", "worker"), "stop 20 s", ("training",)),
            (("node",), "stop 20 s", ("exchanging",)),
            (("alpha",), "disk full", ("training", "exchanging", "evaluating")),
            (("node machine",), "clock jump", ("joining", "training", "exchanging")),
            *_lines("joining", "training", "exchanging", "evaluating"),
            *_lines("training", line="all lines"),
        ],
    ),
    *_cells(
        "gossip",
        masked=True,
        plan=[
            (("node", "worker"), "kill", ("training", "grouping", "opening", "committing", "evaluating")),
            (("node machine",), "kill", ("training", "grouping")),
            (("node",), "stop 20 s", ("training", "grouping")),
            (("alpha",), "disk full", ("training", "grouping", "evaluating")),
            (("node machine",), "clock jump", ("training", "grouping")),
            *_lines("training", "grouping", "evaluating"),
            *_lines("grouping", line="all lines"),
        ],
    ),
]
CELLS = [cell for cell in _ALL if cell.fault != "disk full" or can_mount()]
"""All cells that this account can try: a disk of its own is for root to mount."""
