"""What secure aggregation holds in memory: at a site beyond its update, and at the server for many sites against few.

A site with 100 million parameters writes and masks its update, and hands it over as the worker does, on a socket; the
states before and after training are there already and do not count, nor does the update itself (200 MB in the 16-bit
ring). The server adds the masked
updates of 4 or of 64 sites, of 10 million parameters, and opens their sum; the sites share its process and have one
update at a time. Each is measured in a process of its own.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable

import numpy as np

from benchmarks.figure import Figure
from benchmarks.fresh_process import forget_peak, in_fresh_process, peak_bytes, resident_bytes
from benchmarks.places import Places
from benchmarks.secure_aggregation_cohort import CONTEXT, Cohort, masked_update
from client import worker_socket
from core_training.state import Manifest, TrainableState
from strategies import figures
from strategies.draws import rounding_key
from strategies.exchange import Envelope
from strategies.ring import RingCodec
from strategies.ring_scale import Scale

SITES = 16
FEW, MANY = 4, 64
WEIGHT = 1000
FIGURES = [0] * figures.COUNT


def measure(places: Places) -> Iterable[Figure]:
    held, peak, update = in_fresh_process(one_site, parameters=100_000_000).result
    yield Figure(
        name="secure_site_memory",
        meaning="a site's peak memory beyond its update, 100 million parameters",
        value=(peak - held - update) / 1e6,
        unit="MB",
        target=64.0,
        details={"bytes_before": held, "bytes_at_peak": peak, "bytes_of_update": update},
    )
    few, many = (in_fresh_process(server, sites=sites, parameters=10_000_000).peak_bytes for sites in (FEW, MANY))
    yield Figure(
        name="secure_server_memory",
        meaning=f"server's peak memory for {MANY} masked updates a round, relative to that for {FEW}",
        value=many / few,
        unit="",
        target=1.1,
        details={f"peak_bytes_{FEW}": few, f"peak_bytes_{MANY}": many},
    )


def one_site(parameters: int) -> tuple[int, int, int]:
    """Bytes held before, bytes at the peak, bytes of the update."""
    start, trained, codec = _states_and_codec(parameters, SITES)
    cohort = Cohort(SITES)
    name, site = next(iter(cohort.sites.items()))
    order = cohort.begin(1, codec).mask_order(name)
    forget_peak()
    held = resident_bytes()
    vector = codec.encode(trained, start, WEIGHT, FIGURES, rounding_key(0, name, 1))
    statement = site.mask(1, order, CONTEXT, vector)
    _hand_over(masked_update(1, statement, codec.to_bytes(vector)))
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


def server(sites: int, parameters: int) -> None:
    """A whole round."""
    start, trained, codec = _states_and_codec(parameters, MANY)
    cohort = Cohort(sites)
    round_ = cohort.begin(1, codec)
    for name in cohort.sites:
        vector = codec.encode(trained, start, WEIGHT, FIGURES, rounding_key(0, name, 1))
        cohort.mask(round_, 1, name, codec, vector)
        del vector
    total, _ = cohort.unmask(round_)
    assert codec.decode(total, sites, start).weight == sites * WEIGHT


def _states_and_codec(parameters: int, sites: int) -> tuple[TrainableState, TrainableState, RingCodec]:
    """A state before and after training, in memory, and the codec of a round of so many sites."""
    manifest = Manifest.of({f"layer.{number:03d}": (1000, 1000) for number in range(parameters // 1_000_000)})
    start, trained = (
        TrainableState(manifest, np.full(manifest.size, value, dtype=np.float32)) for value in (0.01, 0.011)
    )
    scale = Scale(exponents=[0] * len(manifest.tensors), weight_cap=1024)
    return start, trained, RingCodec(manifest, 16, sites, 2.0**-7, scale, None, figures.COUNT)
