"""The virtual sites of a simulation: one base model in memory, one engine a site, swapped in and out."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from client.site import SiteService
from core_training.data.records import Record, data_files, records_in, source_name
from core_training.engine.dataset import Dataset, NothingToTrainError, load_dataset
from core_training.engine.engine import Engine
from core_training.engine.failures import explained
from core_training.foundation.environment import train_alone
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import Trainable
from core_training.models.base_model import BaseModel
from core_training.recipe.learning_rate import with_sites
from core_training.recipe.named_sites import check_named_sites
from core_training.recipe.schema import Recipe
from core_training.stages.base import Stage, load_stage
from simulations.enrolment import enrolments_of
from simulations.partition import Partition, divide
from strategies.messages import SITE_NAME, Envelope

_log = logging.getLogger(__name__)


def simulated_sites(recipe: Recipe) -> Partition:
    """Each site's name and records. Raises InputError when the recipe describes no sites, or not well."""
    sites = _sites(recipe)
    for name in sites:
        if not re.match(SITE_NAME, name):
            raise InputError(
                f"simulation.sites: '{name}': a site's name is letters, digits, '.', '_', '-'; name it otherwise"
            )
    if said := recipe.too_few_for_groups(len(sites)):
        raise InputError(said)
    for key, least in recipe.fewest_sites.items():
        if least > len(sites):
            raise InputError(f"{key}: {least} is more than the {len(sites)} sites")
    check_named_sites(recipe, sites)
    return sites


def _sites(recipe: Recipe) -> Partition:
    given = recipe.simulation.sites
    if given is not None:
        named = given.items() if isinstance(given, dict) else [(source_name(path), path) for path in data_files(given)]
        sites: Partition = {}
        for name, pattern in named:
            if name in sites:
                raise InputError(f"simulation.sites: two sites are called '{name}'; name them with a mapping")
            sites[name] = _read(recipe, str(pattern))
            if not sites[name]:
                raise InputError(f"simulation.sites: site '{name}' ({pattern}) holds no record")
        return sites
    if recipe.simulation.partition is None:
        raise InputError("simulation: give the sites' files (simulation.sites) or a partition (simulation.partition)")
    if recipe.data.train is None:
        raise InputError("data.train: a partition needs the data set that it divides")
    return divide(_read(recipe, recipe.data.train), recipe)


def _read(recipe: Recipe, patterns: str | list[str]) -> list[Record]:
    """The records of files. Under `data.on_error: skip` lines that are none are left out, which is said."""
    errors: list[InputError] = []
    on_error = errors.append if recipe.data.on_error == "skip" else None
    records = list(records_in(patterns, recipe.data.max_samples, on_error))
    if errors:
        _log.warning("data.on_error: %d lines that are no records are skipped; the first: %s", len(errors), errors[0])
    return records


def _datasets(recipe: Recipe, stage: Stage[Any], records: Partition) -> dict[str, Dataset]:
    """The sites' data. Sites that a partition left with nothing to train on take no part, which is said.

    Raises InputError for one of the sites that the recipe names itself, and where too few are left.
    """
    datasets, empty = {}, []
    for name in records:
        try:
            datasets[name] = load_dataset(recipe, stage, records[name])
        except NothingToTrainError as error:
            if recipe.simulation.partition is None:
                raise
            empty.append(f"{name} ({len(records[name])})")
            last = error
    if empty:
        _log.warning(
            "simulation.partition: %d of %d sites take no part, as none of their few records is left to train on: %s",
            len(empty),
            len(records),
            ", ".join(empty),
        )
        if len(datasets) < recipe.needed_sites:
            raise last
    return datasets


class SitePool:
    """The sites' services, all in this process and of one base model. Use them from one thread.

    `recipe` is the one that was given, with the number of the sites.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """Load the base model and all sites' data. The services keep their runs under `folder`/NAME.

        Raises InputError for anything wrong with them, before training starts.
        """
        train_alone()
        records = simulated_sites(recipe)
        self.recipe = recipe = with_sites(recipe, len(records))
        with explained("loading the model and the sites' data", recipe):
            self._stage = load_stage(recipe, BaseModel(recipe))
            self._datasets = _datasets(recipe, self._stage, records)
        names = list(self._datasets)
        self._enrolments = enrolments_of(names, "gossip" if recipe.topology.kind == "gossip" else "federated")
        self._folder = folder
        self._services: dict[str, SiteService] = {}

    @property
    def names(self) -> list[str]:
        return list(self._datasets)

    def service(self, name: str) -> SiteService:
        """The site's service; its engine is built when it joins a run."""
        if name not in self._services:
            enrolment = self._enrolments[name]
            self._services[name] = SiteService(name, self._opener(name), self._folder / name, enrolment)
        return self._services[name]

    def ask(self, name: str) -> Callable[[Envelope], Awaitable[Envelope]]:
        """The site's service as a gossip node asks it."""

        async def ask(order: Envelope) -> Envelope:
            return self.service(name).handle(order)

        return ask

    def close(self) -> None:
        for service in self._services.values():
            service.close()

    def _opener(self, name: str) -> Callable[[Recipe], Trainable]:
        return lambda _: Engine(self._stage, self._datasets[name])
