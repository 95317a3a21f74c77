"""Masking, unmasking and bytes of 10 million parameters among 16 sites of which two leave, beside Flower's SecAgg+.

Both quantise and mask the same changes with equal weights, in turn, in one process; the two means are compared. Ours
counts the codec, the masks, the digest and signature of what is sent, and the writing of the site's record; the peer,
all that its client mod does in the stage that masks. Unmasking ends with the mean, in both. AES is asked for the bytes
of as many masks as a site adds, by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from benchmarks.secure_aggregation.cohort import Cohort
from benchmarks.secure_aggregation.peer import Arrays, peer_round
from core_training.foundation.errors import RunError
from core_training.foundation.state import Manifest, TrainableState
from strategies import figures
from strategies.draws import rounding_key
from strategies.ring import RingCodec
from strategies.ring_scale import Scale

SITES, LEAVING = 16, 2
THRESHOLD = 11
"""Of 16: more than two thirds, for both."""
ROUNDS = 3
MANIFEST = Manifest.of({f"layer.{number:02d}": (1000, 1000) for number in range(10)})
WEIGHT = 1000
CHANGE = 1e-3
LARGEST_CHANGE = 2.0**-7
"""Eight standard deviations of a change: nothing is cut."""


def measure(places: Places) -> Iterable[Figure]:
    seen = in_fresh_process(compare).result
    yield Figure(
        name="secure_masking",
        meaning="a site's quantising and masking, times faster than Flower's SecAgg+",
        value=statistics.median(_ratios(seen["peer_masking"], seen["masking"])),
        unit="",
        target=10.0,
        at_least=True,
        details={key: seen[key] for key in ("peer_masking", "masking", "of_which_encoding")},
    )
    yield Figure(
        name="secure_masking_cipher",
        meaning="a site's masking, relative to AES-CTR's own time for as many masks",
        value=statistics.median(_ratios(seen["masking_encoded"], seen["cipher"])),
        unit="",
        target=3.0,
        details={key: seen[key] for key in ("masking_encoded", "cipher")},
    )
    yield Figure(
        name="secure_unmasking",
        meaning=f"the server's unmasking with {LEAVING} of {SITES} gone, times faster than Flower's SecAgg+",
        value=statistics.median(_ratios(seen["peer_unmasking"], seen["unmasking"])),
        unit="",
        target=10.0,
        at_least=True,
        details={key: seen[key] for key in ("peer_unmasking", "unmasking", "of_which_decoding")},
    )
    yield Figure(
        name="secure_bytes",
        meaning="bytes up a parameter, 16-bit ring: a round's, and all of the batch's set-up",
        value=seen["bytes_up"] / MANIFEST.size,
        unit="",
        target=2.02,
        details={
            "rounds_in_the_batch": ROUNDS,
            "bytes_of_setup": seen["bytes_of_setup"],
            "peer_bytes_a_parameter": seen["peer_bytes_up"] / MANIFEST.size,
        },
    )


def compare() -> dict[str, Any]:
    """Seconds of both sides, site by site and round by round; bytes of the site that sent most."""
    cohort = Cohort(SITES, ROUNDS)
    setup = max(spent.bytes_up for spent in cohort.spent.values())
    seen = _Seen()
    for number in range(1, ROUNDS + 1):
        _round(cohort, number, seen)
    return {
        **vars(seen),
        "bytes_of_setup": setup,
        "bytes_up": setup + (max(spent.bytes_up for spent in cohort.spent.values()) - setup) / ROUNDS,
    }


class _Seen:
    def __init__(self) -> None:
        self.masking: list[float] = []
        self.of_which_encoding: list[float] = []
        self.masking_encoded: list[float] = []
        self.cipher: list[float] = []
        self.unmasking: list[float] = []
        self.of_which_decoding: list[float] = []
        self.peer_masking: list[float] = []
        self.peer_unmasking: list[float] = []
        self.peer_bytes_up = 0


def _round(cohort: Cohort, number: int, seen: _Seen) -> None:
    start = TrainableState(MANIFEST, np.zeros(MANIFEST.size, dtype=np.float32))
    scale = Scale(exponents=[0] * len(MANIFEST.tensors), weight_cap=1024)
    codec = RingCodec(MANIFEST, 16, SITES, LARGEST_CHANGE, scale, figures=figures.COUNT)
    ours = cohort.begin(number, codec)
    names = iter(cohort.sites)
    trained = start

    def update(node: int) -> Arrays:
        nonlocal trained
        trained = TrainableState(MANIFEST, _changes(node))
        return list(trained.buffer.reshape(len(MANIFEST.tensors), -1))

    def take_turn() -> None:
        name = next(names)
        before = cohort.spent[name].seconds
        began = time.perf_counter()
        vector = codec.encode(trained, start, WEIGHT, [0] * figures.COUNT, rounding_key(0, name, number))
        encoding = time.perf_counter() - began
        cohort.mask(ours, number, name, codec, vector)
        masking = cohort.spent[name].seconds - before
        seen.of_which_encoding.append(encoding)
        seen.masking_encoded.append(masking)
        seen.masking.append(encoding + masking)
        seen.cipher.append(_cipher_alone(SITES, vector.nbytes))

    peer = peer_round(update, SITES, LEAVING, THRESHOLD, take_turn)
    total, unmasking = cohort.unmask(ours)
    began = time.perf_counter()
    outcome = codec.decode(total, SITES - LEAVING, start)
    decoding = time.perf_counter() - began
    seen.of_which_decoding.append(decoding)
    seen.unmasking.append(unmasking + decoding)
    seen.peer_masking += peer.masking_seconds
    seen.peer_unmasking.append(peer.unmasking_seconds)
    seen.peer_bytes_up = max(peer.bytes_up.values())
    difference = float(np.abs(outcome.state.buffer - np.concatenate(peer.mean)).max())
    if difference > CHANGE / 10:
        raise RunError(f"both sides do not do the same: their means differ by {difference:g}")


def _changes(node: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(node).standard_normal(MANIFEST.size, dtype=np.float32) * np.float32(CHANGE)


def _cipher_alone(masks: int, nbytes: int) -> float:
    """Seconds of AES-256-CTR for `masks` streams of so many bytes, into a buffer that stays in the cache."""
    zeros = bytes(1 << 18)
    buffer = bytearray(len(zeros))
    began = time.perf_counter()
    for number in range(masks):
        stream = Cipher(AES256(number.to_bytes(32, "big")), CTR(bytes(16))).encryptor()
        for _ in range(0, nbytes, len(zeros)):
            stream.update_into(zeros, buffer)
    return time.perf_counter() - began


def _ratios(these: list[float], those: list[float]) -> list[float]:
    return [this / that for this, that in zip(these, those, strict=True)]
