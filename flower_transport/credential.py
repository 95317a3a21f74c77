"""The operator's credential: who shows what lies in its file may operate the SuperLink. Knows no interface of Flower's.

The file is its owner's alone (0600) and made anew at each start of a server. A call shows it in a header, over TLS to
who holds the key of the server's certificate.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from core_training.foundation.errors import InputError
from security.private_files import read_private_file, write_private_file

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
    from starlette.types import Scope

HEADER = "x-fedloom-credential"
_BYTES = 32


def make_credential(path: Path) -> None:
    """Put a new credential in the place of whatever an earlier server had."""
    path.unlink(missing_ok=True)
    write_private_file(path, secrets.token_hex(_BYTES).encode())


def read_credential(path: Path) -> str:
    """The credential in `path`. Raises InputError when there is none, it is cut short, or others may read it."""
    credential = read_private_file(path).decode("ascii", errors="replace") if path.exists() else ""
    if len(credential) != 2 * _BYTES:
        raise InputError(
            f"{path}: no operator's credential; `fedloom server stop`, then `server start`, which makes one"
        )
    return credential


def is_shown(scope: Scope, credential: str) -> bool:
    """Whether the request shows the credential, once and nothing else in its place."""
    shown = [value for name, value in scope["headers"] if name == HEADER.encode()]
    return len(shown) == 1 and hmac.compare_digest(shown[0], credential.encode())


class ShowCredential:
    """A client's interceptor that shows the credential with each call."""

    def __init__(self, credential: str) -> None:
        self._credential = credential

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[HEADER] = self._credential
        response: httpx.Response = call_next(context)
        return response
