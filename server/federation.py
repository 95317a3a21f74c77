"""The federation folder: where the server's keys, roster, runs and logs lie. Knows no processes and no sockets.

In the folder: `federation.yaml` (the address), `roster.json` (admitted sites: name, public key, node id), `keys/`
(ca.crt to hand out; ca.key, server.crt and server.key, which stay), `runs/<run id>/`, `flower/` (Flower's database and
what it unpacks), `run/` and `logs/` (locks and output of the processes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from core_training.durable import commit_file
from core_training.errors import InputError
from core_training.recipe import Section
from strategies.exchange import SITE_NAME

FEDERATION_FOLDER = "FEDLOOM_FEDERATION_FOLDER"
"""Environment variable that tells the ServerApp where the federation folder is."""

FEDERATION_FILE = "federation.yaml"


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
    """An admitted site. `node_id` is the number that Flower gave it; None until it is registered."""

    name: Annotated[str, Field(pattern=SITE_NAME)]
    public_key: str
    node_id: int | None = None


_ROSTER = TypeAdapter(list[Site])


@dataclass(frozen=True)
class Federation:
    """The paths of a federation folder, and its roster."""

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
    def superlink_lock(self) -> Path:
        return self.folder / "run" / "superlink.lock"

    @property
    def superlink_log(self) -> Path:
        return self.folder / "logs" / "superlink.log"

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
        return self.folder / "run" / f"{run_id}.lock"

    def sites(self) -> list[Site]:
        """The roster."""
        try:
            return _ROSTER.validate_json(self._roster.read_bytes())
        except FileNotFoundError:
            return []
        except ValidationError as error:
            raise InputError(f"{self._roster}: this is not a roster: {error.errors()[0]['msg']}") from None

    def site_names(self) -> dict[int, str]:
        """Flower's node number: the site's name, of all sites that are registered."""
        return {site.node_id: site.name for site in self.sites() if site.node_id is not None}

    def admit(self, site: Site) -> None:
        """Add a site. Raises InputError when its name or its key is on the roster already."""
        sites = self.sites()
        for known in sites:
            if known.name == site.name:
                raise InputError(f"a site named '{site.name}' is admitted already")
            if known.public_key == site.public_key:
                raise InputError(f"this key is admitted already, as site '{known.name}'")
        self._write_roster([*sites, site])

    def set_node_id(self, name: str, node_id: int) -> None:
        """Note the number that Flower gave to a site."""
        self._write_roster(
            [site.model_copy(update={"node_id": node_id}) if site.name == name else site for site in self.sites()]
        )

    @property
    def _roster(self) -> Path:
        return self.folder / "roster.json"

    def _write_roster(self, sites: list[Site]) -> None:
        commit_file(self._roster, json.dumps([site.model_dump() for site in sites], indent=1).encode())


def _dial(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_federation(folder: Path) -> Federation:
    """The federation in `folder`. Raises InputError when there is none."""
    path = folder / FEDERATION_FILE
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Federation(folder.absolute(), Address.model_validate(document))
    except FileNotFoundError:
        raise InputError(f"{folder}: no federation here; make one with `fedloom server init`") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None
