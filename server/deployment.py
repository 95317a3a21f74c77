"""A federation as its operator has it: made, sites admitted, its processes started and stopped, runs submitted.

Flower gives up a run when its SuperLink is stopped or killed. fedloom does not: a run that was submitted is wanted
until it is finished or fails with a reason, every start wants all that are not finished, and the round loop goes on
from their last commit.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING

import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

import core_training.foundation.environment  # noqa: F401 - for the processes that are started here
from core_training.foundation import background
from core_training.foundation.bounded_reading import ForeignTextError, read_bounded, reason_of
from core_training.foundation.durable import commit_file, new_folder
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.kept_processes import log_of
from core_training.recipe.learning_rate import with_sites
from core_training.recipe.named_sites import check_named_sites
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.trackers import check_trackers
from security.certificates import (
    AUTHORITY_CERTIFICATE,
    create_authority,
    issue_server_certificate,
    load_certificate,
    load_private_key,
)
from security.identities import identity_in
from security.private_files import LARGEST_KEY_FILE, make_private_folder
from server.evaluation_requests import Request, ask_for
from server.federation import FEDERATION_FILE, Address, Federation, Site, left_out, open_federation
from server.rewinding import check_rewind, rewind
from server.run_progress import RunProgress, has_work, is_finished, read_progress
from server.supervisor import end_server_apps

if TYPE_CHECKING:
    from flower_transport.control import Control

_log = logging.getLogger(__name__)

STARTS_WITHIN = 60.0
_ENDS_WITHIN = 30.0


def init_federation(folder: Path, address: Address, also_known_as: list[str]) -> Federation:
    """Make a federation in `folder`: its authority, its server certificate (for `address` and other names), its file.

    Raises InputError when there is one already.
    """
    if (folder / FEDERATION_FILE).exists():
        raise InputError(f"{folder}: there is a federation already; choose another folder")
    new_folder(folder, "--folder")
    make_private_folder(folder)
    create_authority(folder / "keys")
    issue_server_certificate(folder / "keys", [address.host, *also_known_as])
    commit_file(folder / FEDERATION_FILE, yaml.safe_dump(address.model_dump(), sort_keys=False).encode())
    federation = open_federation(folder)
    federation.runs.mkdir()
    return federation


def admit_site(federation: Federation, name: str, public_key_file: Path) -> Site:
    """Admit a site; a running SuperLink learns of it at once, another one when it starts."""
    public_key, identity = _read_public_keys(public_key_file)
    federation.admit(Site(name=name, public_key=public_key, identity=identity))
    if background.owner(federation.superlink_lock) is not None:
        _register_sites(federation)
    return next(site for site in federation.sites() if site.name == name)


def start_server(federation: Federation) -> tuple[Popen[bytes] | None, list[str]]:
    """Start the server's processes unless they run, and want all unfinished runs.

    Returns the supervisor's process (None when it was running) and the ids of the runs that are taken up.
    Raises InputError when the port is taken or a key or certificate is unusable.
    """
    running = background.owner(federation.server_lock) is not None
    if not running:
        _check_certificates(federation)
        _end_processes(federation)  # those that a killed supervisor left behind
        _check_port(federation.address)
    before = _want_unfinished_runs(federation)
    supervisor = None if running else _start_supervisor(federation)
    try:
        _await_superlink(federation, is_the_first=not running)
    except RunError:
        if supervisor is not None:
            stop_server(federation)
        raise
    _register_sites(federation)
    # A process that was just killed may still have held its lock; whoever is taken up has none, or another one.
    now = _want_unfinished_runs(federation)
    return supervisor, [run_id for run_id, process in now.items() if process is None or process != before.get(run_id)]


def stop_server(federation: Federation) -> bool:
    """Stop the server and the runs' processes; the next start goes on with the runs. Returns whether it ran."""
    running = background.stop(federation.server_lock, _ENDS_WITHIN)
    return _end_processes(federation) or running


def submit_run(federation: Federation, recipe_file: Path, overrides: list[str]) -> str:
    """Check a recipe, make its run folder and start the run. Returns the run id."""
    recipe = load_recipe(recipe_file, overrides)
    check_trackers(recipe)
    if recipe.topology.kind != "federated":
        raise InputError(f"topology.kind: a server runs 'federated' recipes, not '{recipe.topology.kind}'")
    able = federation.sites() if recipe.privacy.secure is None else federation.identities()
    if said := recipe.too_few_for_groups(len(able)):
        raise InputError(said)
    if recipe.privacy.secure is not None:
        _check_identities(federation, recipe)
    if background.owner(federation.server_lock) is None:
        raise InputError(f"the server is not running; `fedloom server start --folder {federation.folder}` starts it")
    recipe = with_sites(recipe, len(federation.sites()))
    check_named_sites(recipe, [site.name for site in federation.sites()])
    run_id = _new_run_id(federation, recipe_file.stem.strip("-") or "recipe")  # standard input has no name
    commit_file(federation.runs / run_id / "recipe.yaml", recipe.to_yaml().encode())
    federation.want(run_id)
    return run_id


def evaluate_run(federation: Federation, run_id: str, request: Request) -> Path:
    """Have the sites judge a finished run's result on their data sets of a name. Returns the folder of the results.

    Raises InputError for a run that has no result, what no site computes, and where the server is not running.
    """
    from evaluation.federated.site_sums import Plan  # NumPy takes a while to import

    folder = federation.run_folder(run_id)
    if not is_finished(folder):
        raise InputError(f"run {run_id} has no result yet; `fedloom server status` tells of it")
    recipe = load_recipe(folder / "recipe.yaml")
    Plan(tuple(request.metrics), tuple(request.labels), request.resamples, recipe.topology.own_steps is not None)
    privacy = recipe.privacy.differential_privacy
    if recipe.stage == "reward":
        raise InputError(f"run {run_id} is of stage reward: it scores answers, and there is nothing to ask it")
    if background.owner(federation.server_lock) is None:
        raise InputError(f"the server is not running; `fedloom server start --folder {federation.folder}` starts it")
    if privacy is not None and not privacy.tell_losses:
        _log.warning(
            "run %s is under differential privacy: sites whose site.yaml does not say evaluation.despite_differential_"
            "privacy tell nothing of it",
            run_id,
        )
    place = ask_for(folder, request)
    federation.want(run_id)
    return place


def rewind_run(federation: Federation, run_id: str, to: int, without: Sequence[str] = ()) -> bool:
    """Take a run back to the end of an earlier round, and go on from there without some sites.

    Returns whether it goes on now: not where the server is not running. Raises InputError, and leaves the run as it is,
    where it cannot be taken back so far, or too few sites would be left.
    """
    folder = federation.run_folder(run_id)
    check_rewind(folder, to)
    _check_left_out(federation, folder, without)
    federation.let_go(run_id)  # first, so that nobody starts another process for it
    try:
        background.stop(federation.run_lock(run_id))
        with background.claim(federation.run_lock(run_id)):
            rewind(folder, to, without)
    finally:
        federation.want(run_id)
    return background.owner(federation.server_lock) is not None


def _check_left_out(federation: Federation, folder: Path, without: Sequence[str]) -> None:
    names = {site.name for site in federation.sites()}
    if unknown := sorted(set(without) - names):
        raise InputError(
            f"--without {unknown[0]}: no site of that name is admitted; there are {', '.join(sorted(names))}"
        )
    left = names - {*without, *left_out(folder)}
    key, least = max(load_recipe(folder / "recipe.yaml").fewest_sites.items(), key=lambda item: item[1])
    if len(left) < least:
        raise InputError(f"--without: {len(left)} sites would be left, and the run needs {least} ({key})")


def _check_identities(federation: Federation, recipe: Recipe) -> None:
    """Raise InputError when too few admitted sites can take part in a run with secure aggregation."""
    able = sorted(federation.identities())
    lacking = [site.name for site in federation.sites() if site.identity is None]
    key, least = max(recipe.fewest_sites.items(), key=lambda item: item[1])
    if len(able) < least:
        key = key.removeprefix("privacy.secure_aggregation.")
        remedy = "admit more with `fedloom server admit`"
        if lacking:
            remedy += f", or once more, with both lines of their node.pub: {', '.join(lacking)}"
        raise InputError(
            f"privacy.secure_aggregation: the recipe needs {least} sites ({key}), and {len(able)} of the admitted ones "
            f"have an identity ({', '.join(able) or 'none'}); {remedy}"
        )
    if not federation.has_handed_out_a_roster():
        raise InputError(
            "privacy.secure_aggregation: the sites do not know each other's identities yet; write them with "
            "`fedloom server roster`, then at every site: fedloom client pin roster.json"
        )


def running_processes(federation: Federation) -> dict[str, int | None]:
    """The process number of the supervisor (`server`) and of those that it keeps; None for what does not run."""
    locks = (federation.server_lock, federation.superlink_lock, federation.superexec_lock)
    return {lock.stem: background.owner(lock) for lock in locks}


def site_states(federation: Federation) -> dict[str, str] | None:
    """Each admitted site: online, offline, or registered (never seen yet). None when the server is not running."""
    if background.owner(federation.superlink_lock) is None:
        return None
    with _control(federation) as superlink:
        states = {node.node_id: node.status for node in superlink.nodes()}
    return {site.name: states.get(site.node_id or 0, "unknown") for site in federation.sites()}


def is_worked_on(federation: Federation, run_id: str) -> bool:
    """Whether a process carries out the run, or the server is about to start one."""
    if background.owner(federation.run_lock(run_id)) is not None:
        return True
    return federation.is_wanted(run_id) and background.owner(federation.server_lock) is not None


def run_states(federation: Federation) -> list[RunProgress]:
    """Each run's progress; the note of one that stands still for want of a process says so."""
    runs = [read_progress(federation.runs / run_id) for run_id in federation.run_ids()]
    return [run if run.finished or is_worked_on(federation, run.run_id) else _left_alone(run) for run in runs]


def _left_alone(run: RunProgress) -> RunProgress:
    said = [run.note] if run.note else []
    note = "; ".join([*said, "nobody works on it: `fedloom server start` goes on with it"])
    return replace(run, state="failed" if run.state == "failed" else "unattended", note=note)


def _want_unfinished_runs(federation: Federation) -> dict[str, int | None]:
    """Want the runs that are not finished; returns the number of the process that carries each out, None for none."""
    unfinished = [run_id for run_id in federation.run_ids() if has_work(federation.runs / run_id)]
    for run_id in unfinished:
        federation.want(run_id)
    return {run_id: background.owner(federation.run_lock(run_id)) for run_id in unfinished}


def _register_sites(federation: Federation) -> None:
    """Make Flower's list of nodes agree with the admitted sites: register who is missing, note everybody's number."""
    with _control(federation) as superlink:
        known = {node.public_key: node.node_id for node in superlink.nodes()}
        for site in federation.sites():
            key = load_ssh_public_key(site.public_key.encode())
            pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            node_id = known.get(pem) or superlink.register(pem, site.name)
            if node_id != site.node_id:
                federation.set_node_id(site.name, node_id)


def _read_public_keys(path: Path) -> tuple[str, str | None]:
    """The key that Flower knows a site by, and its identity, where the file has the line of it."""
    try:
        lines = read_bounded(path, LARGEST_KEY_FILE).decode("ascii").strip().splitlines()
        key = load_ssh_public_key(lines[0].encode()) if 1 <= len(lines) <= 2 else None
        identity = identity_in(lines[1]) if len(lines) == 2 else None
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: the public key cannot be read: {reason_of(error)}") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(
            f"{path}: these are not a site's public keys (keys/node.pub: one line ecdsa-sha2-nistp384 …, "
            "one line ssh-ed25519 …)"
        )
    return lines[0], identity


def _control(federation: Federation) -> AbstractContextManager[Control]:
    from flower_transport.control import control  # Flower takes a second to import
    from server.operating import operator_of

    return control(operator_of(federation))


def _check_certificates(federation: Federation) -> None:
    authority = load_certificate(federation.keys / AUTHORITY_CERTIFICATE)
    certificate = load_certificate(federation.keys / "server.crt", authority)
    if load_private_key(federation.keys / "server.key").public_key() != certificate.public_key():
        raise InputError(f"{federation.keys / 'server.key'}: this key does not belong to server.crt")
    federation.flower_home.mkdir(exist_ok=True)


def _check_port(address: Address) -> None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise InputError(
                f"{address} cannot be used: {error.strerror}; stop what listens there, "
                f"or choose another port in {FEDERATION_FILE}"
            ) from None


def _await_superlink(federation: Federation, *, is_the_first: bool) -> None:
    """Wait until the SuperLink answers.

    Raises RunError when the first one of a supervisor ends, when the supervisor does, and when none answers in time.
    """
    trust = ssl.create_default_context(cafile=federation.keys / AUTHORITY_CERTIFICATE)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    deadline = time.monotonic() + STARTS_WITHIN
    first = None
    while background.owner(federation.server_lock) is not None:
        running = background.owner(federation.superlink_lock)
        if is_the_first and first not in (None, running):
            raise RunError(f"the SuperLink did not start; {log_of(federation.folder, 'superlink')} says why")
        first = running
        try:
            opener.open(f"https://{federation.address.from_here}/health", timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                log = log_of(federation.folder, "superlink")
                raise RunError(f"the SuperLink does not answer, {log} says why; `fedloom server stop`") from None
            time.sleep(0.1)
    raise RunError(f"the server did not start; {log_of(federation.folder, 'server')} says why")


def _start_supervisor(federation: Federation) -> Popen[bytes]:
    return background.start(
        [sys.executable, "-m", "server.supervisor", str(federation.folder)],
        federation.server_lock,
        log_of(federation.folder, "server"),
    )


def _end_processes(federation: Federation) -> bool:
    """End what a supervisor that is gone has left. Returns whether there was anything but ServerApps."""
    superexec = background.stop(federation.superexec_lock)
    end_server_apps(federation)
    return background.stop(federation.superlink_lock) or superexec


def _new_run_id(federation: Federation, stem: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:60] + datetime.now().strftime("-%Y%m%d-%H%M%S")
    known = federation.run_ids()
    return next(run_id for run_id in [name, *(f"{name}-{n}" for n in range(2, 1000))] if run_id not in known)
