"""A node's folder: how it is made, and what is read from it at a start. Starts nothing.

In the folder: `site.yaml` (the site's data and models), `p2p.yaml` (where it listens, whom it trusts), `node.json` (to
hand over), `keys/` (never leave it), `runs/` (one folder a run), `run/` and `logs/` (lock and output of processes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from pydantic import Field, ValidationError

from client.site_config import SITE_FILE, parse_site_config
from core_training.foundation.bounded_reading import ForeignTextError, first_error, read_yaml
from core_training.foundation.durable import commit_file, new_folder
from core_training.foundation.errors import InputError
from core_training.parts.section import Section
from p2p.grpc_transport import Identity
from p2p.roster import Member, SignedRoster
from security.certificates import create_node_certificate, load_certificate, load_private_key, to_pem
from security.private_files import make_private_folder

NODE_FILE = "node.json"
P2P_FILE = "p2p.yaml"
KEYS = "keys"


class NodeConfig(Section):
    """`p2p.yaml`: what concerns this node alone."""

    listen: str = Field(description="HOST:PORT to listen on.")
    founder: str | None = Field(default=None, description="Public key of whoever may sign rosters, once it is known.")


def init_node(
    folder: Path,
    name: str,
    listen: str,
    data: Mapping[str, list[str]],
    models: Mapping[str, str],
    address: str | None = None,
) -> Path:
    """Make a node's folder and keys; returns the `node.json` to hand to the founder, which holds nothing secret.

    `address` is where the others reach the node, when that is not where it listens. Raises InputError when there is a
    node already, or something is malformed.
    """
    if (folder / SITE_FILE).exists():
        raise InputError(f"{folder}: there is a site or a node already; choose another folder")
    site = parse_site_config({"name": name, "data": dict(data), "models": dict(models)}, "the node")
    reached_at = address or listen
    _check_address("--listen", listen)
    _check_address("--address", reached_at)
    new_folder(folder, "--folder")
    make_private_folder(folder)
    host = reached_at.rpartition(":")[0].strip("[]")
    files = create_node_certificate(folder / KEYS, site.name, [host])
    member = Member(name=site.name, address=reached_at, certificate=files.certificate.read_text(encoding="ascii"))
    commit_file(folder / NODE_FILE, (member.model_dump_json(indent=2) + "\n").encode())
    _write_yaml(folder / P2P_FILE, NodeConfig(listen=listen))
    _write_yaml(folder / SITE_FILE, site)
    return folder / NODE_FILE


def read_node_config(folder: Path) -> NodeConfig:
    """Read `p2p.yaml`. Raises InputError when the folder holds no node."""
    path = folder / P2P_FILE
    try:
        return NodeConfig.model_validate(read_yaml(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make the node's folder with `fedloom p2p init`") from None
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}") from None


def trusted_founder(folder: Path, given: str | None) -> str:
    """The founder's public key: the one that is pinned, or before the first start the one given.

    Raises InputError when there is none, or another one is given than is pinned.
    """
    pinned = read_node_config(folder).founder
    if pinned is None and given is None:
        raise InputError("--founder is needed at the first start: the public key that `fedloom p2p roster` printed")
    if pinned is not None and given not in (None, pinned):
        raise InputError(f"--founder: this node trusts {pinned}, not {given}; to change that, edit {folder / P2P_FILE}")
    return pinned or str(given)


def pin_founder(folder: Path, founder: str) -> None:
    """Trust this founder, and no other, from now on."""
    _write_yaml(folder / P2P_FILE, read_node_config(folder).model_copy(update={"founder": founder}))


def load_identity(folder: Path, name: str, roster: SignedRoster) -> Identity:
    """The node's certificate and key, checked against each other and against the roster.

    Raises InputError when one is missing, malformed or expired, or the roster has another certificate for this name.
    """
    path = folder / KEYS / "node.crt"
    certificate = load_certificate(path)
    key = load_private_key(folder / KEYS / "node.key")
    if certificate.public_key() != key.public_key():
        raise InputError(f"{path}: the certificate does not belong to node.key beside it")
    if roster.member(name).certificate.strip() != to_pem(certificate).decode().strip():
        raise InputError(
            f"the roster has another certificate for '{name}' than {path}; send the founder your {NODE_FILE}"
        )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(name, to_pem(certificate), pem)


def _check_address(option: str, value: str) -> None:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s/:\[\]]+):(\d{1,5})", value)
    if match is None or not 0 < int(match[2]) < 65536:
        raise InputError(f"{option}: '{value}' is not HOST:PORT, such as 127.0.0.1:9101")


def _write_yaml(path: Path, section: Section) -> None:
    document = section.model_dump(exclude_none=True)
    commit_file(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode())
