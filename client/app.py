"""The site's Flower ClientApp: has each order answered by the site's resident worker. Knows neither models nor data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from client.worker_client import ask
from core_training.foundation.errors import FedloomError
from flower_transport.apps import make_client_app
from strategies.messages import Envelope, Refusal

SITE_FOLDER = "FEDLOOM_SITE_FOLDER"
"""Environment variable that names the site's folder."""

WORKER_FAILED = "the site's worker gave no answer; the site's own logs say why"

_log = logging.getLogger(__name__)


def ask_worker(order: Envelope, node: int) -> Envelope:
    """The worker's answer, or a Refusal that tells others nothing of this machine."""
    try:
        return ask(Path(os.environ[SITE_FOLDER]), order)
    except FedloomError as error:
        # It may tell where on this machine something lies.
        _log.error("'%s' was not answered: %s", order.kind, error)
        return Refusal(reason=WORKER_FAILED).envelope()


app = make_client_app(ask_worker)
