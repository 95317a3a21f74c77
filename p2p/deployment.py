"""A node as its operator has it: started, watched, stopped; and the signing of a federation's roster."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from signal import Signals
from typing import Any

from client.enrolment import load_enrolment
from client.site_config import load_site_config
from client.worker_client import worker_lock
from core_training.foundation import background
from core_training.foundation.bounded_reading import read_json
from core_training.foundation.careful_logging import log_carefully
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError, Interrupted, RunError
from core_training.foundation.health import Health, health
from core_training.foundation.stopping import stopping_when_ready
from core_training.recipe.learning_rate import with_sites
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import Listener, RunFolder
from p2p.grpc_transport import GrpcServer, GrpcTransport
from p2p.ledger import NodeResult
from p2p.node import LINGER_SECONDS, fetch_result, take_part
from p2p.node_folder import KEYS, load_identity, pin_founder, read_node_config, trusted_founder
from p2p.plan import RunPlan
from p2p.roster import SignedRoster, read_member, read_roster, write_roster
from p2p.service import PeerService
from p2p.site_orders import Ask
from security.certificates import ends_soon, last_day
from security.signing import canonical_json, create_signing_key, load_signing_key, public_key_text

FOUNDER_KEY = "founder.key"
_STARTS_WITHIN = 30.0
_LAST_LINE_BYTES = 16 << 10
_WAITS_AT_MOST = 60.0
"""Seconds that a node waits for its peers before a person should look after them."""

Worker = Callable[[Path], AbstractContextManager[Ask]]
"""The trainer of the site in a folder, for as long as a block runs."""


@dataclass(frozen=True)
class NodeRun:
    """A node's run and its roster. `name` distinguishes runs of one recipe and roster; `linger` is of `take_part`."""

    folder: Path
    roster: Path
    recipe: Recipe
    founder: str | None = None
    name: str = "gossip"
    linger: float = LINGER_SECONDS
    fetch_within: float | None = None
    """Seconds within which to take the finished state from others, in place of taking part."""


@dataclass(frozen=True)
class NodeStatus:
    """A node's status, from its folder's files. Losses are by round: mean in training, and held out before it.

    `rounds_done` of its `rounds` counted, and `void_rounds` changed nothing; `round` is the newest one. `note` is the
    newest event, where a person should know of it; `attention` is what a person should see to, each with what to do.
    """

    name: str
    process: int | None
    run_id: str | None = None
    state: str = "has not run yet"
    round: int = 0
    rounds: int = 0
    rounds_done: int = 0
    void_rounds: int = 0
    note: str | None = None
    live: list[str] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    eval_losses: list[float | None] = field(default_factory=list)
    certificate_ends: str | None = None
    attention: list[str] = field(default_factory=list)

    @property
    def health(self) -> Health:
        """A node that has completed its run is well, though it runs no more."""
        return health(self.attention, running=self.process is not None or self.state == "completed")

    def to_json(self) -> dict[str, Any]:
        """The status as people's programs read it; `epoch` and `epochs` are earlier versions' words."""
        return {**asdict(self), "epoch": self.round, "epochs": self.rounds}


def make_roster(node_files: Sequence[Path], founder_folder: Path, out: Path) -> tuple[SignedRoster, str]:
    """Sign a roster of these nodes; returns it and the founder's public key, which people hand over by themselves.

    The founder's key is made in `founder_folder` at the first use. Raises InputError when a `node.json` is unusable.
    """
    members = [read_member(path) for path in node_files]
    key_file = founder_folder / FOUNDER_KEY
    key = load_signing_key(key_file) if key_file.exists() else create_signing_key(key_file)
    return write_roster(out, members, key), public_key_text(key)


def run_node(
    node_run: NodeRun,
    worker: Worker,
    listener: Listener = lambda _: None,
    on_result: Callable[[NodeResult], None] = lambda _: None,
) -> NodeResult:
    """Take part in a run, in this process, until it ends; `listener` is told each event.

    `on_result` is told the result as soon as it is there; the worker has ended then, and the node may stay for others.

    Raises InputError when a file, key, certificate, roster or port is unusable (then nothing was started), RunError
    when the site cannot train, and Interrupted after a signal.
    """
    folder = node_run.folder
    site = load_site_config(folder)
    name, enrolment = site.name, load_enrolment(folder, site)
    enrolment.check(node_run.recipe)
    founder = trusted_founder(folder, node_run.founder)
    roster = read_roster(node_run.roster, founder)
    pin_founder(folder, founder)
    node_run = replace(node_run, recipe=with_sites(node_run.recipe, len(roster.names)))
    run_id = run_id_of(node_run, roster)
    plan = RunPlan(name, roster.names, run_id, node_run.recipe, enrolment.rounding_secret)
    identity = load_identity(folder, name, roster)
    run_folder = RunFolder(folder / "runs" / plan.run_id, listener)

    async def serve() -> NodeResult:
        service = PeerService()
        server = GrpcServer(identity, roster, service)
        await server.start(read_node_config(folder).listen)
        transport = GrpcTransport(identity, roster, plan.recipe.topology.round_deadline)
        try:
            run_folder.prepare(plan.recipe, resume=(run_folder.path / "recipe.yaml").exists())
            commit_file(_current_run(folder), json.dumps({"run_id": plan.run_id, "epochs": plan.rounds}).encode())
            run_folder.event(events.NodeStarted(site=name, run=plan.run_id, roster=list(roster.names)))
            with ExitStack() as stack:
                ask = await _started(stack, worker(folder))

                async def release(result: NodeResult) -> None:
                    await asyncio.to_thread(stack.close)
                    on_result(result)

                if node_run.fetch_within is None:
                    return await take_part(plan, service, transport, ask, run_folder, node_run.linger, release)
                result = await fetch_result(plan, service, transport, ask, run_folder, node_run.fetch_within)
                await release(result)
                return result
        finally:
            await transport.close()
            await server.stop()

    log_carefully()
    with background.claim(node_lock(folder)):
        try:
            return asyncio.run(_until_signal(serve(), lambda: background.stop(worker_lock(folder), patience=0.0)))
        except RunError as error:
            run_folder.event(events.Failed(reason=str(error)))
            raise


def run_id_of(node_run: NodeRun, roster: SignedRoster) -> str:
    """The run's id: the same at every node that has the same recipe, roster and name of the run."""
    recipe = node_run.recipe.model_dump(exclude={"output", "simulation", "deepspeed"})
    digest = hashlib.sha256(canonical_json([recipe, roster.digest, node_run.name])).hexdigest()
    return f"{node_run.name}-{digest[:12]}"


def start_in_background(folder: Path, command: Sequence[str]) -> int:
    """Run the command that runs this node without a terminal; returns its process number once it is at work.

    Its output goes to `logs/node.log`. Raises InputError or RunError, with the last line of it, when it ends at once.
    """
    if (running := background.owner(node_lock(folder))) is not None:
        raise InputError(f"the node is running already (process {running})")
    _current_run(folder).unlink(missing_ok=True)
    log = folder / "logs" / "node.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + _STARTS_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        if _current_run(folder).exists():
            return process.pid
        time.sleep(0.1)
    process.kill()
    kind = InputError if process.wait() == InputError.exit_code else RunError
    raise kind(f"the node did not start: {_last_line(log).removeprefix('error: ')}")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_LINE_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def stop_node(folder: Path) -> bool:
    """End the node's process; it has committed its last round. Returns whether there was one."""
    return background.stop(node_lock(folder), patience=30.0)


def node_status(folder: Path) -> NodeStatus:
    """The node's status, with its newest run so far."""
    name, process = load_site_config(folder).name, background.owner(node_lock(folder))
    certificate = folder / KEYS / "node.crt"
    ends = last_day(certificate).isoformat()
    attention = [note] if (note := ends_soon(certificate)) is not None else []
    again = f"`fedloom p2p start --folder {folder}` with the words of its start goes on with the run"
    try:
        current = read_json(_current_run(folder))
    except FileNotFoundError:
        return NodeStatus(name, process, certificate_ends=ends, attention=attention)
    run = RunFolder(folder / "runs" / current["run_id"])
    status = run.status()
    state = status.state if process is not None or status.state in ("completed", "failed") else "stopped"
    if process is None and state != "completed":
        left = "; its worker is left and ends with the next start" if background.owner(worker_lock(folder)) else ""
        attention.append(f"the node does not run, and its run has not ended{left}: {again}")
    elif state.startswith("waiting") and _seconds_since_the_last_event(run) > _WAITS_AT_MOST:
        attention.append(f"the node is {state}: start these, or see why they cannot be reached")
    points = status.curve.values()
    return NodeStatus(
        name=name,
        process=process,
        run_id=current["run_id"],
        state=state,
        round=status.round,
        rounds=current["epochs"],
        rounds_done=status.rounds_done,
        void_rounds=status.void_rounds,
        note=status.note,
        live=sorted(status.live),
        losses=[point.loss for point in points],
        eval_losses=[point.eval_loss for point in points],
        certificate_ends=ends,
        attention=attention,
    )


def _seconds_since_the_last_event(run: RunFolder) -> float:
    times = [line["time"] for line in run.lines() if "time" in line]
    return (datetime.now(UTC) - datetime.fromisoformat(times[-1])).total_seconds() if times else 0.0


def node_lock(folder: Path) -> Path:
    """The lock that a node holds while it runs."""
    return folder / "run" / "node.lock"


def _current_run(folder: Path) -> Path:
    return folder / "run" / "current.json"


async def _started(stack: ExitStack, worker: AbstractContextManager[Ask]) -> Ask:
    """Start the worker beside the event loop, so that peers hear meanwhile that this node is starting."""
    starting = asyncio.create_task(asyncio.to_thread(stack.enter_context, worker))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await starting  # to be stopped, it must have started
        raise


async def _until_signal(work: Coroutine[Any, Any, NodeResult], end_at_once: Callable[[], object]) -> NodeResult:
    """What `work` comes to. A signal ends it in order; a second one ends this process, after `end_at_once`."""
    task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()

    def leave(number: Signals) -> None:
        end_at_once()
        os._exit(128 + number)  # an exception would have to wait for what the first signal is ending

    with stopping_when_ready(lambda _: loop.call_soon_threadsafe(task.cancel), leave) as stop:
        try:
            return await task
        except asyncio.CancelledError:
            number = stop.number or Signals.SIGINT
            said = "stopped; the last round is committed, and the same command goes on from it"
            raise Interrupted(said, number) from None
