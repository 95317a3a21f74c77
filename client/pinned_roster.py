"""The roster that a site has pinned: whom it hides its updates with, by name and identity. Nothing else is trusted.

It comes from the server's operator, who may be dishonest, so people compare its digest between the sites. From then on
no other key is taken for a site's, whatever the server says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from client.site_config import load_site_config
from core_training.foundation.bounded_reading import ForeignTextError, first_error, read_bounded
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from security.identities import IDENTITY, is_identity, roster_digest
from security.signing import load_signing_key, public_key_text
from strategies.messages import SITE_NAME

ROSTER_FILE = "roster.json"
IDENTITY_KEY = "keys/identity.key"
_MOST_BYTES = 16 << 20


def _one_form(text: str) -> str:
    if not is_identity(text):
        raise ValueError("this is not a public key")
    return text


_Name = Annotated[str, Field(pattern=SITE_NAME)]
_Identity = Annotated[str, Field(pattern=IDENTITY), AfterValidator(_one_form)]
_IDENTITIES = TypeAdapter(Annotated[dict[_Name, _Identity], Field(min_length=1)])


@dataclass(frozen=True)
class PinnedRoster:
    """Names and identities (`ed25519:…`) of the sites, in the order of names."""

    identities: dict[str, str]

    @property
    def digest(self) -> str:
        return roster_digest(self.identities)


def pin_roster(folder: Path, file: Path, *, replace: bool = False) -> PinnedRoster:
    """Keep the roster in `file` as the site's own.

    Raises InputError when it is malformed, does not hold this site with its own key, or when another one is pinned
    and `replace` does not say that it goes.
    """
    name = load_site_config(folder).name
    own = public_key_text(load_identity(folder))
    roster = _read(file)
    if name not in roster.identities:
        raise InputError(
            f"{file}: this site, '{name}', is not in it; it has {', '.join(roster.identities)}. Has the server's "
            f"operator admitted both lines of {folder / 'keys' / 'node.pub'}?"
        )
    if roster.identities[name] != own:
        raise InputError(
            f"{file}: it has another identity for '{name}' than this site's own: somebody put another key in the place "
            f"of yours. Do not take part; ask the server's operator which {folder / 'keys' / 'node.pub'} was admitted"
        )
    pinned = pinned_roster(folder)
    if pinned is not None and pinned != roster and not replace:
        changes = "; ".join(_changes(pinned.identities, roster.identities))
        raise InputError(f"another roster is pinned; this one has {changes}. If that is right: --replace")
    commit_file(folder / ROSTER_FILE, (json.dumps(roster.identities, indent=1) + "\n").encode())
    return roster


def pinned_roster(folder: Path) -> PinnedRoster | None:
    """The roster that the site in `folder` has pinned. Raises InputError when the file is no roster."""
    return _read(folder / ROSTER_FILE) if (folder / ROSTER_FILE).exists() else None


def load_identity(folder: Path) -> Ed25519PrivateKey:
    """The site's identity key. Raises InputError when there is none, or others may read it."""
    if not (folder / IDENTITY_KEY).exists():
        raise InputError(
            f"{folder / IDENTITY_KEY}: no such file; sites made by an earlier version have no identity: make a new "
            "site with `fedloom client init`"
        )
    return load_signing_key(folder / IDENTITY_KEY)


def _read(path: Path) -> PinnedRoster:
    try:
        identities = _IDENTITIES.validate_json(read_bounded(path, _MOST_BYTES))
    except OSError as error:
        raise InputError(f"{path}: the roster cannot be read: {error.strerror or error}") from None
    except (ForeignTextError, ValidationError) as error:
        said = first_error(error).replace(".[key]", "") if isinstance(error, ValidationError) else error
        raise InputError(
            f"{path}: {said}; a roster is what `fedloom server roster` writes, {{name: ed25519:…}}"
        ) from None
    if len(set(identities.values())) < len(identities):
        raise InputError(f"{path}: two sites have the same identity")
    return PinnedRoster(dict(sorted(identities.items())))


def _changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    kinds = {
        "new": sorted(new.keys() - old.keys()),
        "gone": sorted(old.keys() - new.keys()),
        "with another key": sorted(name for name in new.keys() & old.keys() if new[name] != old[name]),
    }
    return [f"{', '.join(names)} {kind}" for kind, names in kinds.items() if names]
