"""What it takes to operate a SuperLink: its address, the certificate to know it by, the credential to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient, ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker

from core_training.foundation.bounded_reading import ForeignTextError, read_bounded, reason_of
from core_training.foundation.errors import InputError, RunError
from flower_transport.credential import ShowCredential, read_credential
from security.private_files import LARGEST_KEY_FILE

_Client = TypeVar("_Client", bound=ProtobufClient)
_Answer = TypeVar("_Answer")


class NoAnswer(RunError):
    """The SuperLink cannot be reached: it may be on its way up again."""


@dataclass(frozen=True)
class Operator:
    """Who operates the SuperLink at `address` (HOST:PORT): the files of its authority's certificate and the credential.

    The credential is shown to a SuperLink whose certificate the authority signed, and to no other.
    """

    address: str
    authority: Path
    credential: Path

    def client(
        self,
        kind: type[_Client],
        component: str,
        *interceptors: ProtobufClientInterceptor,
        retry_invoker: RetryInvoker | None = None,
    ) -> _Client:
        """A client of one of the SuperLink's interfaces, for Flower's `component`.

        Raises InputError when a file is unusable.
        """
        try:
            certificate = read_bounded(self.authority, LARGEST_KEY_FILE)
        except (OSError, ForeignTextError) as error:
            raise InputError(f"{self.authority}: cannot be read: {reason_of(error)}") from None
        client: _Client = kind.from_server_address(
            server_address=self.address,
            insecure=False,
            root_certificates=certificate,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name=component),
                ShowCredential(read_credential(self.credential)),
                *interceptors,
            ],
            retry_invoker=retry_invoker,
        )
        return client


def ask(request: Callable[[], _Answer]) -> _Answer:
    """The SuperLink's answer. Raises NoAnswer when it does not answer, RunError when it refuses."""
    try:
        return request()
    except httpx.HTTPStatusError as error:
        known = FlowerError.from_json(error.response.text)
        raise RunError(f"the SuperLink refused: {known.message if known else error.response.text}") from None
    except httpx.HTTPError as error:
        raise NoAnswer(f"the SuperLink does not answer: {error}") from None
