"""Dividing one data set among sites: evenly, by label skew, by size skew, or by a column's own values.

Pure and seeded: the same records, seed and parameters give the same sites. Every record goes to exactly one site.
(Flower Datasets' partitioners need a `datasets` release that would pull the training libraries back; see
docs/decisions.)
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from core_training.data.records import Record
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe

_log = logging.getLogger(__name__)

Partition = dict[str, list[Record]]


def divide(records: Sequence[Record], recipe: Recipe) -> Partition:
    """The sites that `recipe.simulation` asks for. Raises InputError when a site would be left with nothing."""
    settings = recipe.simulation
    random = np.random.default_rng(recipe.training.seed)
    count = settings.count or 0
    if settings.partition == "natural":
        return _natural(records, settings.by or "")
    if count > len(records):
        raise InputError(f"simulation.count: {count} sites are more than the {len(records)} records")
    if settings.partition == "iid":
        shares = _iid(len(records), count, random)
    elif settings.partition == "size_skew":
        shares = _size_skew(len(records), count, settings.alpha, random)
    else:
        shares = _dirichlet(_labels(records, settings.by or ""), count, settings.alpha, random)
    width = len(str(count - 1))
    return {f"site-{i:0{width}d}": [records[j] for j in sorted(share)] for i, share in enumerate(shares)}


def _iid(total: int, count: int, random: np.random.Generator) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(random.permutation(total), count)]


def _size_skew(total: int, count: int, alpha: float, random: np.random.Generator) -> list[list[int]]:
    """Sizes drawn from a Dirichlet distribution, at least one record each."""
    extra = random.multinomial(total - count, random.dirichlet(np.full(count, alpha)))
    return [part.tolist() for part in np.split(random.permutation(total), np.cumsum(extra + 1)[:-1])]


def _dirichlet(labels: Sequence[str], count: int, alpha: float, random: np.random.Generator) -> list[list[int]]:
    """Spread each label's records over the sites in proportions from Dirichlet(alpha) (Hsu et al. 2019).

    A site that drew nothing gets one record from the largest site.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    for label in sorted(set(labels)):
        members = random.permutation([i for i, other in enumerate(labels) if other == label])
        cuts = np.cumsum(random.dirichlet(np.full(count, alpha)))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, cuts.round().astype(int)), strict=True):
            share.extend(part.tolist())
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return shares


def _natural(records: Sequence[Record], by: str) -> Partition:
    labels = _labels(records, by)
    names = _site_names(set(labels))
    sites: Partition = {}
    for record, label in zip(records, labels, strict=True):
        sites.setdefault(names[label], []).append(record)
    return dict(sorted(sites.items()))


def _site_names(labels: set[str]) -> dict[str, str]:
    """A site's name for each value of a column: the value in the letters that a name may have.

    Where values differ in other letters alone, a part of their digest keeps them apart, which is said.
    """
    plain = {label: re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._")[:63] for label in labels}
    shared = Counter(plain.values())
    names = {}
    for label, name in sorted(plain.items()):
        if not name or (shared[name] > 1 and name != label):
            name = f"{name[:54] or 'site'}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
            _log.warning("simulation.by: the site of '%s' is called %s", label, name)
        names[label] = name
    return names


def _labels(records: Sequence[Record], by: str) -> list[str]:
    for record in records:
        if by not in record.fields:
            raise InputError(f"simulation.by: {record.place} has no column '{by}'; it has {', '.join(record.fields)}")
    return [str(record.fields[by]) for record in records]
