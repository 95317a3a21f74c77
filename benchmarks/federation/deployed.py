"""A federation on this machine, as hospitals have one: server and sites as processes, over TLS on loopback."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.places import Places
from client.deployment import init_site, start_site, stop_site
from client.pinned_roster import pin_roster
from core_training.foundation.errors import RunError
from core_training.recipe.schema import Recipe
from core_training.runs.events import Event
from core_training.runs.run_folder import RunFolder
from server.deployment import admit_site, init_federation, start_server, stop_server, submit_run
from server.federation import Address, Federation
from server.run_progress import follow


@contextmanager
def deployed(
    folder: Path, places: Places, records: Mapping[str, Path], model: Path, *overrides: str
) -> Iterator[tuple[Federation, Path]]:
    """A running federation whose sites have pinned its roster, and the recipe of its runs.

    `records` are the sites' names and files. The recipe is the MedQuAD example's with these overrides; sites know the
    model as `base`, their records as `questions`.
    """
    recipe = places.recipe("data.train=questions", "model.name_or_path=base", *overrides)
    recipe = recipe.model_copy(
        update={"simulation": Recipe.model_fields["simulation"].get_default(call_default_factory=True)}
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    federation = init_federation(folder / "federation", Address(port=_free_port()), [])
    sites = [folder / name for name in records]
    try:
        start_server(federation)
        for site in sites:
            init_site(
                site,
                name=site.name,
                server=str(federation.address),
                data={"questions": [str(records[site.name])]},
                models={"base": str(model)},
                authority=federation.keys / "ca.crt",
            )
            admit_site(federation, site.name, site / "keys" / "node.pub")
        federation.hand_out_roster(folder / "roster.json")
        for site in sites:
            pin_roster(site, folder / "roster.json")
            start_site(site)
        yield federation, folder / "recipe.yaml"
    finally:
        for site in sites:
            stop_site(site)
        stop_server(federation)


def run_to_the_end(
    federation: Federation,
    recipe: Path,
    sites: int,
    *overrides: str,
    on_event: Callable[[Event], None] = lambda event: None,
) -> RunFolder:
    """Submit a run and wait for it. Raises RunError where it fails, or a site misses a round."""
    run = RunFolder(federation.runs / submit_run(federation, recipe, list(overrides)))
    if not follow(run.path, on_event):
        raise RunError(f"the run did not complete: {list(run.lines())[-3:]}")
    if any(len(event["sites"]) < sites for event in run.lines("round")):
        raise RunError(f"a site was missing in a round: {[*run.lines('quarantined'), *run.lines('late')]}")
    return run


def moment(event: dict[str, Any]) -> datetime:
    """When an event happened."""
    return datetime.fromisoformat(event["time"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
