"""A site as its operator has it: its folder and keys are made here, its processes started, stopped and reported on.

In the folder: `site.yaml` (what the site says about itself), `ca.crt` (whom it trusts), `keys/` (node.key and
identity.key stay, node.pub goes to the server's operator), `roster.json` (the identities that the site has pinned),
`runs/` (what the worker keeps of each run), `run/` and `logs/` (locks and output of the processes).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import Popen

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

import core_training.foundation.environment  # noqa: F401 - for the processes that are started here
from client.enrolment import load_enrolment
from client.link import Link, note_link, read_link
from client.pinned_roster import IDENTITY_KEY
from client.server_address import parse_server
from client.server_probe import ServerProbe, probe_server
from client.site_config import SITE_FILE, load_site_config, parse_site_config
from client.supervisor import PROCESSES
from core_training.foundation import background
from core_training.foundation.durable import commit_file, new_folder
from core_training.foundation.errors import InputError
from core_training.foundation.kept_processes import lock_of, log_of
from security.certificates import AUTHORITY_CERTIFICATE, load_certificate
from security.identities import ssh_line
from security.private_files import make_private_folder, read_private_file, write_private_file
from security.signing import create_signing_key

CONNECTS_WITHIN = 30.0


def init_site(
    folder: Path, name: str, server: str, data: Mapping[str, list[str]], models: Mapping[str, str], authority: Path
) -> Path:
    """Make a site's folder with its keys; returns the public keys' file, which goes to the server's operator.

    `data` and `models` map the names in recipes to paths here, `authority` is the federation's certificate. Raises
    InputError when there is a site already, a name is malformed or the certificate is unusable.
    """
    if (folder / SITE_FILE).exists():
        raise InputError(f"{folder}: there is a site already; choose another folder")
    parse_server(server)
    config = parse_site_config({"name": name, "server": server, "data": dict(data), "models": dict(models)}, "the site")
    load_certificate(authority)
    new_folder(folder, "--folder")
    make_private_folder(folder)
    (folder / AUTHORITY_CERTIFICATE).write_bytes(authority.read_bytes())
    public_key = _make_keys(folder, config.name)
    document = config.model_dump(exclude_none=True)
    commit_file(folder / SITE_FILE, yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode())
    return public_key


def start_site(folder: Path) -> tuple[Popen[bytes], Link]:
    """Start the site's processes and wait, for some seconds, until the server has taken the site in.

    Returns the supervisor and how the site stands with the server; while that cannot be reached the site keeps trying.
    Raises InputError when the site runs already, when a key, certificate or roster is unusable, and when the server
    does not know the site.
    """
    config = load_site_config(folder)
    if config.server is None:
        raise InputError(f"{folder / SITE_FILE}: server: a site of a federation needs the server's HOST:PORT")
    if (running := background.owner(lock_of(folder, "site"))) is not None:
        raise InputError(f"the site '{config.name}' is running already (process {running})")
    load_certificate(folder / AUTHORITY_CERTIFICATE)
    read_private_file(folder / "keys" / "node.key")
    load_enrolment(folder, config)
    probe = _check_server(config.server, folder / AUTHORITY_CERTIFICATE)
    note_link(folder, "connecting")
    supervisor = background.start(
        [sys.executable, "-m", "client.supervisor", str(folder.absolute())],
        lock_of(folder, "site"),
        log_of(folder, "site"),
    )
    link = _wait_for_link(folder, supervisor)
    # Flower refuses an unknown key, a second session of a known one, and a wrong clock alike. One that was never known
    # is unknown.
    if link.state == "refused" and link.node_id is None and probe.clock_note is None:
        stop_site(folder)
        raise InputError(
            f"the server at {config.server} does not know this site's key; hand {folder / 'keys' / 'node.pub'} to its "
            f"operator, for `fedloom server admit {config.name} node.pub`"
        )
    return supervisor, link


def stop_site(folder: Path) -> bool:
    """End all of the site's processes. Returns whether there were any."""
    stopped = [background.stop(lock_of(folder, process)) for process in PROCESSES]
    return any(stopped)


def running_processes(folder: Path) -> dict[str, int | None]:
    """The process number of each of the site's processes; None where it does not run."""
    return {process: background.owner(lock_of(folder, process)) for process in PROCESSES}


def _make_keys(folder: Path, name: str) -> Path:
    """The key that Flower knows the site by, and the identity that the other sites know it by."""
    key = ec.generate_private_key(ec.SECP384R1())
    make_private_folder(folder / "keys")
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_private_file(folder / "keys" / "node.key", secret)
    identity = create_signing_key(folder / IDENTITY_KEY)
    public_key = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    public = folder / "keys" / "node.pub"
    public.write_text(f"{public_key} {name}\n{ssh_line(identity, name)}\n", encoding="ascii")
    return public


def _check_server(address: str, authority: Path) -> ServerProbe:
    """Look at the server; it may be away. Raises InputError when its certificate is not to be trusted."""
    probe = probe_server(address, authority)
    if probe.distrusted:
        raise InputError(f"the server at {address} {probe.failure}")
    return probe


def _wait_for_link(folder: Path, supervisor: Popen[bytes]) -> Link:
    deadline = time.monotonic() + CONNECTS_WITHIN
    link = Link("connecting")
    while link.state == "connecting" and time.monotonic() < deadline and supervisor.poll() is None:
        time.sleep(0.1)
        link = read_link(folder)
    return link
