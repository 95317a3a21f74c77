"""The federation folder: where the server's keys, list of sites, runs and logs lie. Knows no processes and no sockets.

In the folder: `federation.yaml` (the address), `roster.json` (admitted sites: name, keys, node id), `rosters/` (what
sites were given to pin, by digest), `keys/` (ca.crt to hand out; ca.key, server.crt and server.key, which stay),
`runs/<run id>/`, `flower/` (Flower's numbers of the sites, messages), `run/` and `logs/` (locks and output of the
processes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from core_training.foundation.bounded_reading import (
    MOST_JSON_BYTES,
    ForeignTextError,
    first_error,
    read_bounded,
    read_json,
    read_yaml,
)
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from core_training.foundation.kept_processes import lock_of
from core_training.parts.section import Section
from security.identities import IDENTITY, roster_digest
from strategies.messages import SITE_NAME

FEDERATION_FOLDER = "FEDLOOM_FEDERATION_FOLDER"
"""Environment variable that names the federation folder to the ServerApp."""

FEDERATION_FILE = "federation.yaml"
LEFT_OUT = "left-out.json"
"""In a run's folder: the names of the sites that take no part in it any more."""


class Address(Section):
    """The content of `federation.yaml`: where the server listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 9092

    @property
    def from_here(self) -> str:
        """HOST:PORT as a process on the server's own machine dials it."""
        return _dial({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)

    def __str__(self) -> str:
        return _dial(self.host, self.port)


class Site(Section):
    """An admitted site: the key that Flower knows it by, and the identity that the other sites know it by.

    `identity` is None where the site handed over none; it takes no part in secure aggregation then. `node_id` is the
    number that Flower gave it; None until it is registered.
    """

    name: Annotated[str, Field(pattern=SITE_NAME)]
    public_key: str
    identity: Annotated[str, Field(pattern=IDENTITY)] | None = None
    node_id: int | None = None


_SITES = TypeAdapter(list[Site])


@dataclass(frozen=True)
class Federation:
    """The paths of a federation folder, and its admitted sites."""

    folder: Path
    address: Address

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def flower_home(self) -> Path:
        return self.folder / "flower"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def operator_credential(self) -> Path:
        """The file with what the SuperLink is shown by whoever operates it; a running server has one."""
        return self.folder / "run" / "operator.credential"

    @property
    def server_lock(self) -> Path:
        """The lock that the supervisor of the server's processes holds."""
        return lock_of(self.folder, "server")

    @property
    def superlink_lock(self) -> Path:
        return lock_of(self.folder, "superlink")

    @property
    def superexec_lock(self) -> Path:
        return lock_of(self.folder, "superexec")

    def run_ids(self) -> list[str]:
        """All runs that were submitted, in the order of their names."""
        return sorted(recipe.parent.name for recipe in self.runs.glob("*/recipe.yaml"))

    def run_folder(self, run_id: str) -> Path:
        """A run's folder. Raises InputError when there is no such run."""
        if run_id not in self.run_ids():
            raise InputError(f"{self.runs}: no run '{run_id}' here; `fedloom server status` lists them")
        return self.runs / run_id

    def run_lock(self, run_id: str) -> Path:
        """The lock that the process holds in which a run's rounds are going on."""
        return lock_of(self.folder, run_id)

    def want(self, run_id: str) -> None:
        """Note that a run is to be carried out, by whatever processes it takes."""
        self._wanted(run_id).parent.mkdir(exist_ok=True)
        self._wanted(run_id).touch()

    def let_go(self, run_id: str) -> None:
        """Note that a run has come to its end, or failed with a reason: nobody need take it up."""
        self._wanted(run_id).unlink(missing_ok=True)

    def is_wanted(self, run_id: str) -> bool:
        return self._wanted(run_id).exists()

    def wanted(self) -> list[str]:
        """The runs that are to be carried out, in the order of their names."""
        noted = sorted(note.stem for note in (self.folder / "run").glob("*.wanted"))
        return [run_id for run_id in noted if (self.runs / run_id / "recipe.yaml").exists()]

    def sites(self) -> list[Site]:
        """The admitted sites."""
        try:
            return _SITES.validate_json(read_bounded(self._admitted, MOST_JSON_BYTES))
        except FileNotFoundError:
            return []
        except (OSError, ForeignTextError) as error:
            raise InputError(f"{self._admitted}: this is no list of sites: {error}") from None
        except ValidationError as error:
            raise InputError(f"{self._admitted}: this is no list of sites: {first_error(error)}") from None

    def site_names(self) -> dict[int, str]:
        """Flower's node number: the site's name, of all sites that are registered."""
        return {site.node_id: site.name for site in self.sites() if site.node_id is not None}

    def sites_of(self, run_id: str) -> dict[int, str]:
        """The same, without those that were left out of the run when it was taken back."""
        without = left_out(self.run_folder(run_id))
        return {node: name for node, name in self.site_names().items() if name not in without}

    def identities(self) -> dict[str, str]:
        """The identities of the sites that have one, by name."""
        return dict(sorted((site.name, site.identity) for site in self.sites() if site.identity is not None))

    def hand_out_roster(self, path: Path) -> dict[str, str]:
        """Write the roster that every site pins; returns it. Raises InputError when no site has an identity."""
        if path.absolute() == self._admitted:
            raise InputError(f"{path}: this is the server's own list of sites; name another file with --out")
        identities = self.identities()
        if not identities:
            raise InputError("no admitted site has an identity yet; `fedloom server admit` takes it from node.pub")
        content = (json.dumps(identities, indent=1) + "\n").encode()
        commit_file(self._handed_out / f"{roster_digest(identities)}.json", content)
        commit_file(path, content)
        return identities

    def has_handed_out_a_roster(self) -> bool:
        return any(self._handed_out.glob("*.json"))

    def roster_of(self, digest: str) -> dict[str, str]:
        """The roster that was handed out under this digest. Raises InputError when there was none.

        Sites may have pinned an earlier one than the newest: a run goes on with what its sites agreed on.
        """
        path = self._handed_out / f"{digest}.json"
        try:
            roster: dict[str, str] = read_json(path)
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file: the sites have pinned a roster that `fedloom server roster` did not write here"
            ) from None
        except (OSError, ForeignTextError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        return roster

    def admit(self, site: Site) -> None:
        """Add a site, or the identity that a site had not handed over so far.

        Raises InputError when its name or one of its keys is admitted already.
        """
        sites = {known.name: known for known in self.sites()}
        held = sites.pop(site.name, None)
        if held is not None and (site.identity is None or held != _without_identity(site, held.node_id)):
            raise InputError(f"a site named '{site.name}' is admitted already")
        for known in sites.values():
            if known.public_key == site.public_key:
                raise InputError(f"this key is admitted already, as site '{known.name}'")
            if known.identity is not None and known.identity == site.identity:
                raise InputError(f"this identity is admitted already, as site '{known.name}'")
        admitted = site.model_copy(update={"node_id": held.node_id if held else None})
        self._write_sites([*sites.values(), admitted])

    def set_node_id(self, name: str, node_id: int) -> None:
        """Note the number that Flower gave to a site."""
        self._write_sites(
            [site.model_copy(update={"node_id": node_id}) if site.name == name else site for site in self.sites()]
        )

    def _wanted(self, run_id: str) -> Path:
        return self.folder / "run" / f"{run_id}.wanted"

    @property
    def _handed_out(self) -> Path:
        return self.folder / "rosters"

    @property
    def _admitted(self) -> Path:
        return self.folder / "roster.json"

    def _write_sites(self, sites: list[Site]) -> None:
        commit_file(self._admitted, json.dumps([site.model_dump() for site in sites], indent=1).encode())


def _without_identity(site: Site, node_id: int | None) -> Site:
    return site.model_copy(update={"identity": None, "node_id": node_id})


def _dial(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def left_out(run_dir: Path) -> list[str]:
    """The sites that take no part in a run any more, since it was taken back."""
    try:
        names: list[str] = json.loads((run_dir / LEFT_OUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return names


def open_federation(folder: Path) -> Federation:
    """The federation in `folder`. Raises InputError when there is none."""
    path = folder / FEDERATION_FILE
    try:
        return Federation(folder.absolute(), Address.model_validate(read_yaml(path)))
    except FileNotFoundError:
        raise InputError(f"{folder}: no federation here; make one with `fedloom server init`") from None
    except (OSError, ForeignTextError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}") from None
