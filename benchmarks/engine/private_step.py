"""What hiding each record costs a step, and hiding whole sites a masked update: time and memory beside the plain ones.

Private and plain engine take turns in one process, a slice each, so that whatever else the machine does falls on both;
both have LoRA and rows of one example. Memory is the peak of a process of its own for each. A site's noise is beside
what a site does in a masked round without it: a slice of training, and writing the vector.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places

MOST_TIME, MOST_MEMORY, MOST_NOISE = 1.25, 1.3, 5.0
SLICES, STEPS = 5, 6
_TERMS = "privacy.differential_privacy={noise_multiplier: 1.0}"


def measure(places: Places) -> Iterator[Figure]:
    total = (SLICES + 1) * STEPS
    keys = ("topology.kind=central", f"training.max_steps={total}", f"training.save_steps={total}")
    plain, hidden = (places.recipe(*keys, "training.packing=false", *more).to_yaml() for more in ((), (_TERMS,)))
    details = in_fresh_process(in_turns, plain=plain, hidden=hidden).result
    yield Figure(
        name="private_step",
        meaning="a step that hides each record, LoRA, over a plain one's time for a token",
        value=details["ratio"],
        unit="",
        target=MOST_TIME,
        details=details,
    )
    peaks = [in_fresh_process(peak_bytes, recipe_text=text).result for text in (plain, hidden)]
    yield Figure(
        name="private_step_memory",
        meaning="peak memory of a process that trains so, over a plain one's",
        value=peaks[1] / peaks[0],
        unit="",
        target=MOST_MEMORY,
        details={"plain_bytes": peaks[0], "private_bytes": peaks[1]},
    )
    masked = places.recipe(
        *("topology.kind=federated", "topology.rounds=2", "topology.local_steps=5", "training.packing=false"),
        *("privacy.secure_aggregation=true", "privacy.codec=ring32"),
    )
    details = in_fresh_process(noise_of_a_site, recipe_text=masked.to_yaml()).result
    yield Figure(
        name="private_sites",
        meaning="noise on a site's update, over its slice of training and its vector without noise",
        value=details["percent"],
        unit="%",
        target=MOST_NOISE,
        details=details,
    )


def in_turns(plain: str, hidden: str) -> dict[str, Any]:
    """Let both engines train in turn; the median over the slices after the first of the ratio of seconds a token."""
    from core_training.engine.engine import open_engine
    from core_training.recipe.reading import parse_recipe

    engines = [open_engine(parse_recipe(text)) for text in (plain, hidden)]
    slices = []
    for _ in range(SLICES + 1):
        reports = [engine.train(STEPS) for engine in engines]
        slices.append([report.seconds / report.tokens for report in reports])
    ratios = [private / usual for usual, private in slices[1:]]
    return {"ratio": statistics.median(ratios), "ratios": ratios, "tokens_a_second": [1 / s for s in slices[-1]]}


def peak_bytes(recipe_text: str) -> int:
    """Train a few steps; returns the most memory that the process had."""
    from core_training.engine.engine import open_engine
    from core_training.recipe.reading import parse_recipe

    open_engine(parse_recipe(recipe_text)).train(2 * STEPS)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def noise_of_a_site(recipe_text: str) -> dict[str, float]:
    """The seconds that a site takes to train a slice, to write its vector, and to write it with noise."""
    from core_training.engine.engine import open_engine
    from core_training.recipe.reading import parse_recipe
    from strategies import figures
    from strategies.codec_of_round import ring_codec
    from strategies.ring_scale import first_scale

    plain = parse_recipe(recipe_text)
    hidden = parse_recipe(
        recipe_text,
        overrides=[
            "privacy.differential_privacy={level: site, noise_multiplier: 1.0}",
            *("privacy.clip=null", "aggregation.weights=equal"),
        ],
    )
    engine = open_engine(plain)
    start = engine.initial_state
    report = engine.train(plain.topology.local_steps or 1)
    trained = engine.read_state()
    seconds = []
    for recipe in (plain, hidden):
        codec = ring_codec(recipe, start.manifest, 1, first_scale(recipe, start.manifest), 6)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            codec.encode(trained, start, 1, [0] * figures.COUNT, bytes(16))
            times.append(time.perf_counter() - began)
        seconds.append(statistics.median(times))
    without = report.seconds + seconds[0]
    return {
        "percent": 100 * (seconds[1] - seconds[0]) / without,
        "slice_seconds": report.seconds,
        "vector_seconds": seconds[0],
        "vector_with_noise_seconds": seconds[1],
        "values": start.manifest.size,
    }
