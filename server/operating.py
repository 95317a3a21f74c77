"""A federation's SuperLink as the operator's own processes reach it."""

from __future__ import annotations

from flower_transport.operator import Operator
from security.certificates import AUTHORITY_CERTIFICATE
from server.federation import Federation


def operator_of(federation: Federation) -> Operator:
    """Who operates the federation's SuperLink, from its own machine."""
    return Operator(
        str(federation.address.from_here), federation.keys / AUTHORITY_CERTIFICATE, federation.operator_credential
    )
