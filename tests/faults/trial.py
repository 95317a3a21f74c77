"""One cell carried out: a run is begun, struck, helped as the documents say where it needs help, and judged."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from tests.faults import strikes
from tests.faults.cells import Cell
from tests.faults.federation import FederatedWorld
from tests.faults.gossip import GossipRun, GossipWorld
from tests.faults.points import FEDERATED, GOSSIP, Point
from tests.faults.strikes import FAULTS, NothingToHit
from tests.faults.world import Outcome, Run, World

WORLDS: dict[str, Callable[[], World]] = {"federated": FederatedWorld, "gossip": GossipWorld}
_POINT_WITHIN = 120.0
_ENDS_WITHIN = 180.0
"""Seconds within which a run ends once its fault is over: several of its deadlines. Later is a hang."""

_LOOKS_EVERY = 0.004
_TRIES = 3
"""How often a cell is tried whose fault came when its point had passed."""


@dataclass
class Verdict:
    """What came of a cell. All that should be nothing is empty or False where all is well."""

    cell: Cell
    helped: list[str] = field(default_factory=list)
    """The documented commands that were given; none where the run went on by itself."""
    void: int = 0
    late: int = 0
    seconds: float = 0.0
    over: float = 0.0
    """Seconds more than an undisturbed run takes."""
    same: bool = False
    """Whether the state is an undisturbed run's, bit for bit; it has to be, where all took part in every round."""
    lost: str = ""
    hung: str = ""
    wrong: str = ""
    orphans: list[str] = field(default_factory=list)
    locks: list[str] = field(default_factory=list)
    missed: bool = False
    """Whether the fault always came too late to strike at its point."""
    without: list[str] = field(default_factory=list)
    """The sites to which the result is to be handed over, as they were away, or could not keep it, at the end."""
    notes: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not (self.lost or self.hung or self.wrong or self.orphans or self.locks or self.missed)

    def document(self) -> dict[str, object]:
        return {"name": self.cell.name, **asdict(self)}


@dataclass(frozen=True)
class Undisturbed:
    """A run of the same recipe, over the same parties, to which nothing was done."""

    state: str
    seconds: float


class _Hung(Exception):
    """A run does not come to its end."""


class Trials:
    """A world, and what an undisturbed run in it is like."""

    def __init__(self, topology: str) -> None:
        self.topology = topology
        self.world = WORLDS[topology]()
        self._points = FEDERATED if topology == "federated" else GOSSIP
        self._undisturbed: dict[bool, Undisturbed] = {}

    def try_cell(self, cell: Cell) -> Verdict:
        """Carry out a cell; a verdict in any case. A world that does not come up again is to be closed."""
        if cell.masked not in self._undisturbed:
            self._undisturbed[cell.masked] = self._run_undisturbed(masked=cell.masked)
        for _ in range(_TRIES):
            verdict = self._try_once(cell)
            if not verdict.missed:
                break
        return verdict

    def warm_up(self) -> None:
        """Have a federation's processes, which live on, load what later runs need not load; gossip nodes start anew."""
        if self.topology == "federated":
            self._run_undisturbed(masked=False)

    def restart(self, last: Verdict) -> None:
        """Stop everything, as the documents say; what is left over counts against the last cell. Start it again."""
        self.world.stop()
        self._note_leftovers(last)
        self.world.settle()

    def close(self) -> None:
        self.world.close()

    def _try_once(self, cell: Cell) -> Verdict:
        verdict, began = Verdict(cell), time.time()
        run = self.world.begin(masked=cell.masked)
        try:
            self._strike(cell, self._points[cell.point], run, verdict)
            self._follow(run, verdict)
            self._judge(cell, run.outcome(), began, verdict)
            verdict.helped += [f"{command} (afterwards)" for command in self.world.settle()]
            self._note_leftovers(verdict)
        except _Hung as hung:
            verdict.hung = str(hung)
        except Exception as error:
            if "running already" in str(error):
                verdict.locks.append(str(error))
            else:
                verdict.lost = f"{type(error).__name__}: {error}"
            verdict.notes.append(traceback.format_exc())
        finally:
            if isinstance(run, GossipRun):
                run.end()
        return verdict

    def _strike(self, cell: Cell, point: Point, run: Run, verdict: Verdict) -> None:
        self._wait_for(point, run)
        fault = FAULTS[cell.fault]
        try:
            with fault.strike(self.world, run, cell.component):
                verdict.missed = point.passed(run)
                strikes.hold_for(0 if verdict.missed else fault.seconds)
        except NothingToHit:
            verdict.missed = True

    def _wait_for(self, point: Point, run: Run) -> None:
        deadline = time.monotonic() + _POINT_WITHIN
        while not point.begun(run):
            if run.is_over() or time.monotonic() > deadline:
                raise _Hung(f"the run never came to the point '{point.name}'")
            time.sleep(_LOOKS_EVERY)

    def _follow(self, run: Run, verdict: Verdict) -> None:
        """Look on until the run is over; give the documented command whenever it stands still."""
        deadline = time.monotonic() + _ENDS_WITHIN
        while not run.is_over():
            if command := run.go_on():
                verdict.helped.append(command)
            if time.monotonic() > deadline:
                raise _Hung(f"not over {_ENDS_WITHIN:.0f} s after the fault")
            time.sleep(0.2)

    def _judge(self, cell: Cell, outcome: Outcome, began: float, verdict: Verdict) -> None:
        undisturbed = self._undisturbed[cell.masked]
        verdict.void, verdict.late = outcome.void, outcome.late
        verdict.seconds = round(outcome.ended - began, 1)
        verdict.over = round(verdict.seconds - undisturbed.seconds, 1)
        verdict.same = outcome.state == undisturbed.state
        verdict.notes += outcome.notes
        # A masked run over a server completes with two of three sites: the one that was hit may have been away then.
        if cell.topology == "federated" and cell.masked and outcome.missing == ["north"]:
            verdict.without = outcome.missing
        elif outcome.missing:
            verdict.lost = f"no result at {', '.join(outcome.missing)}"
        if len(set(outcome.results.values())) > 1:
            verdict.wrong = f"results differ: {outcome.results}"
        elif outcome.counted_wrong:
            verdict.wrong = "a round is missing from the account, or in it twice"
        elif outcome.all_took_part and not verdict.same:
            verdict.wrong = "all took part in every round, and the state is not an undisturbed run's"

    def _note_leftovers(self, verdict: Verdict) -> None:
        orphans, locks = self.world.leftovers()
        verdict.orphans += orphans
        verdict.locks += locks

    def _run_undisturbed(self, *, masked: bool) -> Undisturbed:
        began, run, looked_after = time.time(), self.world.begin(masked=masked), Verdict(Cell("", masked, "", "", ""))
        try:
            self._follow(run, looked_after)
            outcome = run.outcome()
        finally:
            if isinstance(run, GossipRun):
                run.end()
        assert not looked_after.helped, looked_after.helped
        assert outcome.all_took_part, outcome
        assert not outcome.missing, outcome
        assert not outcome.counted_wrong, outcome
        assert outcome.state is not None
        assert len(set(outcome.results.values())) == 1, outcome
        return Undisturbed(outcome.state, outcome.ended - began)
