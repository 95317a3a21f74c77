"""A thousand sites that aggregate securely, of which a twentieth drops out: it completes, and what a site has to do.

Above 51 sites each masks with its 50 nearest on a ring, so that a site's time and bytes stay what they are when the
federation grows. Rounds of 250, 500 and 1,000 sites, 100,000 parameters, in one process; half of those that drop out do
so before they mask, the other half when the sum is to be opened. The sum must be that of the sites that masked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from benchmarks.secure_aggregation.cohort import Cohort
from core_training.foundation.errors import RunError
from core_training.foundation.state import Manifest, TrainableState
from strategies import figures
from strategies.draws import rounding_key
from strategies.ring import RingCodec, RingSum
from strategies.ring_scale import Scale

SITES = (250, 500, 1000)
DROPPED = 0.05
RING_BITS = 24
MANIFEST = Manifest.of({"layer": (100_000,)})


def measure(places: Places) -> Iterable[Figure]:
    seen = {sites: in_fresh_process(one_round, sites=sites).result for sites in SITES}
    few, many = seen[SITES[0]], seen[SITES[-1]]
    for what, unit in (("seconds", "time"), ("bytes", "bytes up and down")):
        yield Figure(
            name=f"secure_many_sites_{what}",
            meaning=f"a site's {unit} among {SITES[-1]} sites, relative to {SITES[0]}",
            value=many[what] / few[what],
            unit="",
            target=1.25,
            details={str(sites): values for sites, values in seen.items()},
        )


def one_round(sites: int) -> dict[str, Any]:
    """What a site spent on a round, the median over the sites that stayed, and the seconds of the server and in all."""
    began = time.perf_counter()
    cohort = Cohort(sites, ring_bits=RING_BITS)
    scale = Scale(exponents=[0], weight_cap=1024)
    codec = RingCodec(MANIFEST, RING_BITS, sites, 2.0**-7, scale, figures=figures.COUNT)
    start = TrainableState(MANIFEST, np.zeros(MANIFEST.size, dtype=np.float32))
    round_, plain = cohort.begin(1, codec), RingSum(codec)
    names = list(cohort.sites)
    leaving = names[:: round(1 / DROPPED)]
    before_masking, before_opening = leaving[::2], leaving[1::2]
    for number, name in enumerate(names):
        if name in before_masking:
            continue
        changes = np.random.default_rng(number).standard_normal(MANIFEST.size, dtype=np.float32) * np.float32(1e-3)
        trained = TrainableState(MANIFEST, changes)
        vector = codec.encode(trained, start, 1000, [0] * figures.COUNT, rounding_key(0, name, 1))
        plain.add(vector)
        cohort.mask(round_, 1, name, codec, vector)
    total, server_seconds = cohort.unmask(round_, before_opening)
    masked = codec.decode(total, plain.count, start)
    if masked.state.digest != plain.result(start).state.digest:
        raise RunError("the sum that was opened is not the sum of what was masked")
    stayed = [spent for name, spent in cohort.spent.items() if name not in leaving]
    return {
        "seconds": statistics.median(spent.seconds for spent in stayed),
        "bytes": statistics.median(spent.bytes_up + spent.bytes_down for spent in stayed),
        "bytes_up": statistics.median(spent.bytes_up for spent in stayed),
        "seconds_of_unmasking_at_the_server": server_seconds,
        "sites_in_the_sum": plain.count,
        "seconds_in_all": time.perf_counter() - began,
    }
