"""The Flower ClientApp: takes an order out of a Flower message, has it answered, and sends the answer back.

Knows neither models nor data. In a deployment the answer comes from the site's resident worker, because Flower starts
a new process for every message; a simulation plugs the site's service in directly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.worker_client import ask
from core_training.foundation.errors import FedloomError
from strategies.flower_records import from_message, to_reply
from strategies.messages import Envelope, Refusal

SITE_FOLDER = "FEDLOOM_SITE_FOLDER"
"""Environment variable that names the site's folder."""

WORKER_FAILED = "the site's worker gave no answer; the site's own logs say why"

_log = logging.getLogger(__name__)


def make_client_app(handle: Callable[[Envelope, Context], Envelope]) -> ClientApp:
    """A ClientApp that answers each order with `handle(order, context)`; a FedloomError becomes a Refusal."""
    client_app = ClientApp()

    @client_app.query()  # type: ignore[untyped-decorator]
    def answer(message: Message, context: Context) -> Message:
        try:
            reply = handle(from_message(message), context)
        except FedloomError as error:
            reply = Refusal(reason=str(error)[:2000]).envelope()
        return to_reply(reply, message)

    return client_app


def _ask_worker(order: Envelope, context: Context) -> Envelope:
    try:
        return ask(Path(os.environ[SITE_FOLDER]), order)
    except FedloomError as error:
        # It may tell where on this machine something lies.
        _log.error("'%s' was not answered: %s", order.kind, error)
        return Refusal(reason=WORKER_FAILED).envelope()


app = make_client_app(_ask_worker)
