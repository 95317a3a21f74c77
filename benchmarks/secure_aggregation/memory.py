"""What a site of a secure run holds in memory beyond its update, with 100 million parameters.

In a process of its own it writes and masks its update, and hands it over as the worker does, on a socket. The states
before and after training are there already and do not count, nor does the update itself (200 MB in the 16-bit ring).
"""

from __future__ import annotations

import socket
import threading

import numpy as np

from benchmarks.figure import Figure
from benchmarks.fresh_process import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from benchmarks.places import Places
from benchmarks.secure_aggregation.cohort import CONTEXT, Cohort, masked_update
from client import worker_socket
from core_training.foundation.state import Manifest, TrainableState
from strategies import figures
from strategies.draws import rounding_key
from strategies.messages import Envelope
from strategies.ring import RingCodec
from strategies.ring_scale import Scale

SITES = 16
MANIFEST = Manifest.of({f"layer.{number:03d}": (1000, 1000) for number in range(100)})


def measure(places: Places) -> Figure:
    held, peak, update = in_fresh_process(one_site).result
    return Figure(
        name="secure_site_memory",
        meaning="a site's peak memory beyond its update, 100 million parameters",
        value=(peak - held - update) / 1e6,
        unit="MB",
        target=64.0,
        details={"bytes_before": held, "bytes_at_peak": peak, "bytes_of_update": update},
    )


def one_site() -> tuple[int, int, int]:
    """Bytes held before, bytes at the peak, bytes of the update."""
    start, trained = (
        TrainableState(MANIFEST, np.full(MANIFEST.size, value, dtype=np.float32)) for value in (0.01, 0.011)
    )
    scale = Scale(exponents=[0] * len(MANIFEST.tensors), weight_cap=1024)
    codec = RingCodec(MANIFEST, 16, SITES, 2.0**-7, scale, figures=figures.COUNT)
    cohort = Cohort(SITES)
    name, site = next(iter(cohort.sites.items()))
    order = cohort.begin(1, codec).mask_order(name)
    forget_peak()
    held = resident_bytes()
    vector = codec.encode(trained, start, 1000, [0] * figures.COUNT, rounding_key(0, name, 1))
    statement = site.mask(1, order, CONTEXT, vector)
    _hand_over(masked_update(1, statement, codec.view(vector)))
    return held, peak_bytes(), codec.payload_bytes


def _hand_over(update: Envelope) -> None:
    """Send it to a reader that keeps nothing."""
    ours, theirs = socket.socketpair()

    def read() -> None:
        while theirs.recv(1 << 16):
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with ours, theirs:
        worker_socket.send(ours, update)
        ours.shutdown(socket.SHUT_WR)
        reader.join()
