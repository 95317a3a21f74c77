"""The page of the matrix: docs/faults.md."""

from __future__ import annotations

from itertools import groupby
from textwrap import fill
from typing import Any

from tests.faults.cells import CELLS
from tests.faults.points import FEDERATED, GOSSIP
from tests.faults.strikes import FAULTS

Verdicts = dict[str, dict[str, Any]]


def page(verdicts: Verdicts) -> str:
    """The matrix as Markdown."""
    found = list(verdicts.values())
    bad = [verdict for verdict in found if _told(verdict).startswith("**")]
    totals = " | ".join(str(sum(bool(verdict[what]) for verdict in found)) for what in _COUNTED)
    by_itself = sum(not verdict["helped"] for verdict in found)
    same = sum(verdict["same"] for verdict in found)
    without = sum(bool(verdict["without"]) for verdict in found)
    lines = [
        _HEAD.format(
            cells=len(found),
            all=len(CELLS),
            totals=totals,
            by_itself=by_itself,
            helped=len(found) - by_itself,
            same=same,
            without=without,
            faults="\n".join(_item(fault.name, fault.says) for fault in FAULTS.values()),
            federated=_points(FEDERATED),
            gossip=_points(GOSSIP),
        )
    ]
    if bad:
        lines += ["## What is not well\n", *(f"- {one['name']}: {_why(one)}" for one in bad), ""]
    for title, of_title in groupby(found, key=_title):
        lines += [f"## {title}\n", _TABLE_HEAD, *map(_row, _by_component(list(of_title))), ""]
    return "\n".join(lines).rstrip() + "\n"


_COUNTED = ("lost", "wrong", "hung", "orphans", "locks", "missed")


def _points(points: dict[str, Any]) -> str:
    return "\n".join(_item(point.name, point.says) for point in points.values())


def _item(name: str, says: str) -> str:
    return fill(f"- **{name}**: {says}", 120, subsequent_indent="  ")


def _title(verdict: dict[str, Any]) -> str:
    cell = verdict["cell"]
    return f"{cell['topology'].capitalize()}, {'masked' if cell['masked'] else 'plain'}"


def _by_component(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    components = list(dict.fromkeys(verdict["cell"]["component"] for verdict in found))
    return sorted(found, key=lambda verdict: components.index(verdict["cell"]["component"]))


def _row(verdict: dict[str, Any]) -> str:
    cell = verdict["cell"]
    figures = [verdict["void"] or "", verdict["late"] or "", f"{verdict['over']:+.0f}"]
    words = [_NAMES.get(cell["component"], cell["component"]), cell["point"], cell["fault"], _told(verdict), *figures]
    return f"| {' | '.join(map(str, words))} |"


def _told(verdict: dict[str, Any]) -> str:
    if wrong := next((what for what in _COUNTED if verdict[what]), None):
        return f"**{wrong}**"
    helped = "; ".join(dict.fromkeys(verdict["helped"])) or "by itself"
    state = "same state" if verdict["same"] else "a round made up for" if verdict["void"] else "a round without it"
    return ", ".join([helped, state, *(f"no result at {site}" for site in verdict["without"])])


def _why(verdict: dict[str, Any]) -> str:
    said = [f"{what}: {verdict[what]}" for what in _COUNTED if verdict[what]]
    return "; ".join(said).replace("|", "/").replace("\n", " ")[:400]


_NAMES = {
    "server": "server's supervisor",
    "site": "site's supervisor",
    "server machine": "all of the server",
    "site machine": "all of a site",
    "node machine": "node and worker",
    "federation": "the server's disk",
    "north": "a site's disk",
    "alpha": "a node's disk",
    "line": "line",
    "all lines": "every line",
}
_TABLE_HEAD = "| component | point | fault | outcome | void | late | s over |\n|---|---|---|---|---|---|---|"
_HEAD = """\
# Faults

One fault at one point of a round in one component, in real federations and gossip groups: three parties as processes on
one machine, over TLS, with a model of two layers and two rounds. Written by `make faults`, which takes one to two hours
on two cores; a few of the cells are in the suite (`tests/faults/test_faults.py`). Root has to run it, who may mount a
disk to fill. An interrupted `make faults` goes on where it was; of its {all} cells, {cells} are in this page.

| cells | lost runs | wrong digests | hangs | orphans | leftover locks | faults that came too late |
|---|---|---|---|---|---|---|
| {cells} | {totals} |

{by_itself} runs went on by themselves, {helped} with the command that [deploy.md](deploy.md) names for the case;
{same} ended in the very state of an undisturbed run. In {without} masked runs the site that was hit could not take the
result at the end, when two of three sites were enough; the table says so, and its operator gets it from the server's.

## What is held to be true of each cell

- **lost**: the run completes, and the server and every site, or every node, has its result. Where a run stands still,
  it has said why (`failed`), or its process is gone, and `fedloom server start`, `client start` or `p2p start` goes
  on with it; the outcome names the command. "afterwards": the run had gone on without, and a supervisor was to be
  replaced.
- **wrong**: all results have the same tensors. Where all parties took part in every round, the state is that of an
  undisturbed run of the same recipe, bit for bit. Plain runs need all three parties (`minimum_sites: 3`), so for them
  that is always so; in masked runs two of three are enough, and a round may have gone on without the third. And each
  round is in the run's account once.
- **hung**: all is over within three minutes after the fault.
- **orphans**: no process is left but those that a lock of their folder stands for. Gossip nodes end by themselves;
  a federation goes on to the next cell, and is stopped after every fifteen, when none may be left at all.
- **locks**: no lock is held by anybody else. A killed party is started again in the same folder.
- **missed**: the fault struck while the run was at its point; a cell whose fault came too late is tried again.

The outcome says whether the run went on by itself or with which command, and whether its state is an undisturbed run's;
else a round counted without the party that was hit, or was void and made up for by another. **void** and **late** are
rounds, or attempts at one, that changed nothing, and answers that came after the deadline (of gossip nodes: states that
were taken from others); **s over** are the seconds over an undisturbed run; on a machine that has other work, they are
good to some ten seconds.

## Faults

{faults}

A component is one process, or all of one party (`all of a site`). *line* is the connection between one site and the
server, or from the other nodes to one node; *every line* those among all nodes.

## Points of a round

Over a server (the site that is hit is `north`):

{federated}

Among gossip nodes (the node that is hit is `alpha`):

{gossip}

## What is not tried

- Two faults at a time, and faults of the machine's kernel: power cuts, disks that lie about what they flushed.
- A clock that jumps for one connection of a process only; a jump back to before the certificates' first day.
- A message that somebody changes under way, or makes: that ends the TLS connection, which is *cut*.
- DeepSpeed groups at a site, and runs on Ray: their processes die together
  ([deploy.md](deploy.md#what-happens-when-a-step-fails)).
- Every product of the three lists: a fault at a site while the server alone has work to do, for one.

"""
