"""What the sites of a run announce when they join, and what most of them agree on. Pure; knows no nodes and no rounds.

No site decides for the others: not the first to connect, and not the one whose files a result would be described with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core_training.foundation.bounded_reading import ForeignTextError, parse_json
from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest
from core_training.foundation.trainable import DataReport
from core_training.runs.result_format import BUFFERS, parse_buffers
from strategies.messages import JoinReply

PIN_ANOTHER = (
    "hand all sites the newest one; then at the site `fedloom client pin --replace roster.json`, and stop and start it"
)

_SHOWN_KEYS = 3
_SHOWN = 8
"""Digits of a digest in a text for people."""


@dataclass(frozen=True)
class Terms:
    """The terms that every site of the run joined on."""

    manifest: Manifest
    initial_digest: str
    initial_state_digest: str
    recipe_digest: str
    roster_digest: str | None
    buffers_digest: str
    """The digest of `buffers.json`, of a whole model that has buffers."""
    layout_digest: str
    """The digest of the small files that stand beside the weights of a result."""


@dataclass(frozen=True)
class Offer:
    """One site's announcement: the terms, the files behind their digest, and its own records and processes."""

    terms: Terms
    layout: Mapping[str, str]
    data: DataReport
    processes: int


def offer_of(reply: JoinReply) -> Offer:
    """Read an announcement. Digests are of the files that came with it, so these are what a site votes for.

    Raises ProtocolError for files that describe no result of these tensors, or would have a reader run code.
    """
    manifest, layout = reply.parsed_manifest, dict(reply.layout)
    names = parse_buffers(layout.get(BUFFERS, "{}")).keys()
    if names & {"__metadata__", *(tensor.name for tensor in manifest.tensors)}:
        raise ProtocolError(f"{BUFFERS} names a trained tensor", fatal=True)
    for name, content in layout.items():
        if "auto_map" in _keys_of(name, content):
            raise ProtocolError(f"{name} names code to be run (auto_map): no result has any", fatal=True)
    terms = Terms(
        manifest,
        reply.initial_digest,
        reply.initial_state_digest,
        reply.recipe_digest,
        reply.roster_digest,
        buffers_digest=_digest(layout.get(BUFFERS)),
        layout_digest=_digest(sorted(layout.items())),
    )
    return Offer(terms, layout, reply.data, reply.processes)


_OTHER_TENSORS = "the site's trainable tensors differ from the run's: another base model or another recipe"
_WHAT_DIFFERS = "its base model, tokenizer, chat template, earlier runs or reward model differ"


def majority(votes: Sequence[Terms]) -> Terms | None:
    """The terms that more than half of the votes are for; None where there are none such."""
    most = max(votes, key=votes.count, default=None)
    return most if most is not None and 2 * votes.count(most) > len(votes) else None


def unlike_the_run(offered: Terms, initial_digest: str | None, manifest: Manifest | None) -> str | None:
    """The reason why an announcement does not fit what a run has committed; None where it fits, or nothing is."""
    if manifest is not None and offered.manifest != manifest:
        return _OTHER_TENSORS
    if initial_digest not in (None, offered.initial_digest):
        return f"the site starts from something else than this run did: {_WHAT_DIFFERS}"
    return None


def difference(offered: Offer, agreed: Terms, layout: Mapping[str, str]) -> str:
    """The reason why a site does not take part in a run on the `agreed` terms, whose result has these files."""
    terms = offered.terms
    if terms.manifest != agreed.manifest:
        return _OTHER_TENSORS
    if terms.recipe_digest != agreed.recipe_digest:
        return "the site reads the recipe differently than the others"
    if terms.roster_digest != agreed.roster_digest:
        return f"the site has pinned another roster than the others; {PIN_ANOTHER}"
    starts = (terms.initial_digest, terms.initial_state_digest, terms.buffers_digest)
    if starts != (agreed.initial_digest, agreed.initial_state_digest, agreed.buffers_digest):
        return f"the site starts from something else than the others: {_WHAT_DIFFERS}"
    return (
        f"the site describes the result in other words than the others ({_differing(offered.layout, layout)}): its "
        "base model's configuration or its versions of peft and transformers differ"
    )


def who_announced_what(offers: Mapping[str, Offer]) -> str:
    """The sites by what they announced, those of one announcement together: only what differs is told."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for site, offer in sorted(offers.items()):
        groups.setdefault(tuple(_in_short(offer.terms).items()), []).append(site)
    differing = {one[0] for group in groups for one in group if any(one not in other for other in groups)}
    return "; ".join(
        f"{', '.join(sites)}: " + ", ".join(f"{what} {digest}" for what, digest in group if what in differing)
        for group, sites in groups.items()
    )


def _in_short(terms: Terms) -> dict[str, str]:
    return {
        "trainable tensors": terms.manifest.digest[:_SHOWN],
        "recipe": terms.recipe_digest[:_SHOWN],
        "start": _digest([terms.initial_digest, terms.initial_state_digest, terms.buffers_digest])[:_SHOWN],
        "roster": (terms.roster_digest or "none")[:_SHOWN],
        "result's files": terms.layout_digest[:_SHOWN],
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _keys_of(name: str, content: str) -> dict[str, Any]:
    try:
        document = parse_json(content)
    except ForeignTextError:
        document = None
    if not isinstance(document, dict):
        raise ProtocolError(f"{name} is not a JSON object", fatal=True)
    return document


def _differing(offered: Mapping[str, str], agreed: Mapping[str, str]) -> str:
    """The files that differ, each with a few keys that do: names alone, since values come from outside."""
    told = []
    for name in sorted(offered.keys() | agreed.keys()):
        if offered.get(name) != agreed.get(name):
            ours, theirs = (_keys_of(name, files.get(name, "{}")) for files in (agreed, offered))
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            told.append(f"{name}: {', '.join(key[:40] for key in keys[:_SHOWN_KEYS])}" if keys else name)
    return "; ".join(told)
