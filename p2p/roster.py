"""The roster: who takes part, under which address and with which certificate, signed by the federation's founder.

The founder's public key is handed over by people once and pinned by every node; nobody else can change the roster.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from core_training.foundation.bounded_reading import ForeignTextError, first_error, read_json
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from security.certificates import common_name, parse_certificate
from security.signing import canonical_json, open_signed_document, sign_document
from strategies.messages import SITE_NAME

_MOST_BYTES = 64 << 20


class Member(BaseModel):
    """A node as the others know it; also the content of the `node.json` that a site hands over."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(pattern=SITE_NAME)]
    address: Annotated[str, Field(pattern=r"^[^\s/:]+:\d{1,5}$|^\[[0-9a-fA-F:]+\]:\d{1,5}$", max_length=300)]
    """HOST:PORT at which the others reach it."""
    certificate: Annotated[str, Field(max_length=20_000)]
    """PEM."""

    def check_certificate(self, source: str) -> None:
        """Raise InputError when the certificate is malformed, expired, or made out to somebody else."""
        certificate = parse_certificate(self.certificate.encode(), f"{source}, certificate of '{self.name}'")
        if common_name(certificate) != self.name:
            raise InputError(f"{source}: the certificate of '{self.name}' is made out to '{common_name(certificate)}'")


class SignedRoster(BaseModel):
    """All members, in the order in which sums are added up."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    members: Annotated[list[Member], Field(min_length=1, max_length=10_000)]

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        for field in ("name", "address", "certificate"):
            value, count = Counter(getattr(member, field) for member in self.members).most_common(1)[0]
            if count > 1:
                raise ValueError(f"two members have the same {field}: {value[:60]}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    def member(self, name: str) -> Member:
        """The member of that name. Raises InputError when there is none."""
        for member in self.members:
            if member.name == name:
                return member
        raise InputError(f"the roster has no member '{name}'; it has {', '.join(self.names)}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the roster's canonical form."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()


def read_member(path: Path) -> Member:
    """Read a `node.json`. Raises InputError when it is not one, or its certificate cannot be used."""
    try:
        member = Member.model_validate(_read_json(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}") from None
    member.check_certificate(str(path))
    return member


def write_roster(path: Path, members: Sequence[Member], founder: Ed25519PrivateKey) -> SignedRoster:
    """Sign a roster of these members, sorted by name. Raises InputError when two have something in common."""
    try:
        roster = SignedRoster(members=sorted(members, key=lambda member: member.name))
    except ValidationError as error:
        raise InputError(f"the roster cannot be made: {first_error(error)}") from None
    signed = sign_document(roster.model_dump(), founder)
    commit_file(path, (json.dumps(signed, indent=2) + "\n").encode())
    return roster


def read_roster(path: Path, founder_public_key: str) -> SignedRoster:
    """Read a roster that this founder signed. Raises InputError when a byte was changed, or another one signed it.

    A member whose certificate has expired does not hinder the others: TLS will refuse that member alone.
    """
    document = open_signed_document(_read_json(path), founder_public_key, str(path))
    try:
        return SignedRoster.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}") from None


def _read_json(path: Path) -> Any:
    try:
        return read_json(path, _MOST_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ForeignTextError as error:
        raise InputError(f"{path}: no roster or node.json: {error}") from None
