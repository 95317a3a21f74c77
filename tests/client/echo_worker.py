"""A worker that answers without a model: `python -m tests.client.echo_worker SITE_FOLDER`.

It echoes an order; `{"die_once": PATH}` in the fields makes it end itself, the first time; `"defect"` makes it raise.
"""

import os
import signal
import sys
import time
from pathlib import Path

from client import worker, worker_socket
from client.site_config import load_site_config
from core_training.foundation.errors import RunError
from strategies.messages import Envelope


def echo(order: Envelope) -> Envelope:
    time.sleep(order.fields.get("sleep", 0))
    if "die_once" in order.fields and not Path(order.fields["die_once"]).exists():
        Path(order.fields["die_once"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if order.kind == "defect":
        raise ZeroDivisionError("a defect")
    if order.kind == "hopeless":
        raise RunError("the loss is no longer finite")
    return Envelope.of("echoed", {**order.fields, "process": os.getpid()}, order.payload)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with worker_socket.listen(folder) as listener:
        worker.serve(listener, echo, load_site_config(folder).max_message_bytes)
