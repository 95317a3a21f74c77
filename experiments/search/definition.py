"""A search as its file says it: the recipe, the keys to vary, the objectives, and how to look. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.foundation.strict_json import strict_json
from core_training.recipe.schema import Recipe
from experiments.documents import check_keys, choice_at, load_mapping, mapping_at, nearest, recipe_of, whole_at
from experiments.running import check_topology
from experiments.search.objectives import Objective, parse_objectives
from experiments.search.space import SearchedKey, grid_of, parse_keys, probes

SAMPLERS = ("tpe", "random", "cma", "grid")
PRUNERS = ("median", "hyperband", "none")
_KEYS = ("recipe", "set", "keys", "objective", "trials", "seed", "sampler", "pruner", "confirm", "keep", "output")


@dataclass(frozen=True)
class Sampler:
    """What proposes values: `startup_trials` are drawn at random first."""

    name: str = "tpe"
    startup_trials: int = 10


@dataclass(frozen=True)
class Pruner:
    """What ends trials early, at the ends of slices.

    median: after `startup_trials` whole ones, those that are worse than the median after as many slices, from slice
    `warmup` on. hyperband: successive halving by `factor`, in brackets.
    """

    name: str = "median"
    startup_trials: int = 4
    warmup: int = 0
    factor: int = 3


@dataclass(frozen=True)
class Confirm:
    """The `top` best are run again, in another topology and with other values; the winner of these wins."""

    top: int
    topology: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """What is searched, and how. `output` holds the journal, the trials' runs, the best recipe and the report."""

    source: str
    home: Path
    recipe: Any
    values: Mapping[str, Any]
    keys: tuple[SearchedKey, ...]
    objectives: tuple[Objective, ...]
    trials: int
    seed: int
    sampler: Sampler
    pruner: Pruner
    confirm: Confirm | None
    keep: str
    output: Path

    def recipe_with(self, values: Mapping[str, Any], output: Path) -> Recipe:
        """The recipe with these values, whose run goes into `output`. Raises InputError where it takes them not."""
        return recipe_of(self.recipe, {**self.values, **values}, self.home, "", output)

    @property
    def base(self) -> Recipe:
        """The recipe without any of the values that are searched."""
        return self.recipe_with({}, self.output / "trials")

    def identity(self) -> dict[str, Any]:
        """What has to be the same for two commands to be of one search, as JSON has it."""
        recipe = self.base.model_dump(mode="json", exclude={"output": True})
        keys = [[key.name, key.kind, key.low, key.high, key.step, key.log, key.labels, key.when] for key in self.keys]
        sampler = [self.sampler.name, self.sampler.startup_trials]
        pruner = [self.pruner.name, self.pruner.startup_trials, self.pruner.warmup, self.pruner.factor]
        objectives = [[one.figure, one.direction] for one in self.objectives]
        return {"recipe": recipe, "keys": keys, "objective": objectives, "seed": self.seed} | {
            "sampler": sampler,
            "pruner": pruner,
        }


def load_search(path: Path, output: Path | None = None) -> Search:
    """Read a search's file; `output` is in place of its own. Raises InputError, before anything is trained."""
    return parse_search(load_mapping(path, "search"), str(path), path.parent, output or None)


def parse_search(document: Mapping[str, Any], source: str, home: Path, output: Path | None = None) -> Search:
    """A search from its document; `source` names it in errors, `home` is the folder of its recipe's file."""
    try:
        search = _parsed(document, source, home, output)
        _check(search)
    except InputError as error:
        said = str(error)
        raise InputError(said if source in said else f"{source}: {said}") from None
    return search


def _parsed(document: Mapping[str, Any], source: str, home: Path, output: Path | None) -> Search:
    check_keys(document, _KEYS, "")
    keys = parse_keys(mapping_at(document, "keys", ""))
    if not keys:
        raise InputError(
            "keys: name at least one, such as `training.learning_rate: {low: 1e-4, high: 1e-1, log: true}`"
        )
    objectives = parse_objectives(document.get("objective", "eval_loss"))
    sampler_name = _name_of(document, "sampler", "tpe")
    trials = whole_at(document, "trials", len(grid_of(keys)) if sampler_name == "grid" else 12, "")
    given = document.get("output", f"runs/{Path(source).stem}")
    if not isinstance(given, str) or not given:
        raise InputError(f"output: name a folder, not {shortened(given)}")
    search = Search(
        source=source,
        home=home,
        recipe=document.get("recipe"),
        values=mapping_at(document, "set", ""),
        keys=keys,
        objectives=objectives,
        trials=trials,
        seed=whole_at(document, "seed", 0, "", least=0),
        sampler=_sampler(document),
        pruner=Pruner("none"),
        confirm=_confirm(document),
        keep=choice_at(document, "keep", "best", ("best", "all"), ""),
        output=output or Path(given).expanduser(),
    )
    return _with_pruner(search, document)


def _name_of(document: Mapping[str, Any], key: str, default: str) -> str:
    """The `name` of a part that is given as a name, or as a mapping."""
    given = document.get(key, default)
    return str(given.get("name", default) if isinstance(given, dict) else given)


def _settings_of(
    document: Mapping[str, Any], key: str, default: str, known: tuple[str, ...], more: tuple[str, ...]
) -> Any:
    given = document.get(key, default)
    if given is None or given is False:
        given = "none"
    settings = given if isinstance(given, dict) else {"name": given}
    check_keys(settings, ("name", *more), f"{key}.")
    choice_at({key: settings.get("name", default)}, key, default, known, "")
    return settings


def _sampler(document: Mapping[str, Any]) -> Sampler:
    settings = _settings_of(document, "sampler", "tpe", SAMPLERS, ("startup_trials",))
    name = settings.get("name", "tpe")
    usual = 5 if name == "tpe" else 1
    return Sampler(name, whole_at(settings, "startup_trials", usual, "sampler."))


def _with_pruner(search: Search, document: Mapping[str, Any]) -> Search:
    """The search with its pruner: the one it names or, where its figure is known on the way, the median."""
    topology = search.base.topology.kind
    single = len(search.objectives) == 1
    able = single and search.objectives[0].can_prune(topology)
    settings = _settings_of(
        document, "pruner", "median" if able else "none", PRUNERS, ("startup_trials", "warmup", "factor")
    )
    name = settings.get("name", "median")
    if name != "none" and not single:
        raise InputError("pruner: with several objectives no trial is ended early; leave it out, or name one objective")
    if name != "none" and not able:
        raise InputError(
            f"pruner: {search.objectives[0].figure} of a {topology} run is not known before its end; leave it out, or "
            "take eval_loss as the objective"
        )
    pruner = Pruner(
        name,
        whole_at(settings, "startup_trials", 4, "pruner.", least=1),
        whole_at(settings, "warmup", 0, "pruner.", least=0),
        whole_at(settings, "factor", 3, "pruner.", least=2),
    )
    return Search(**{**search.__dict__, "pruner": pruner})


def _confirm(document: Mapping[str, Any]) -> Confirm | None:
    settings = mapping_at(document, "confirm", "")
    if not settings:
        return None
    check_keys(settings, ("top", "topology", "set"), "confirm.")
    topology = choice_at(settings, "topology", "federated", ("central", "federated", "gossip"), "confirm.")
    return Confirm(whole_at(settings, "top", 3, "confirm."), topology, mapping_at(settings, "set", "confirm."))


def _check(search: Search) -> None:
    """Raise InputError for what a recipe would not take, and for what could not be told apart."""
    base = search.base
    if base.deepspeed.used:
        raise InputError("deepspeed: a search's trials train in one process without it; leave it out of the recipe")
    check_topology(base, "")
    for name in ("output", "topology.kind"):
        if name in (key.name for key in search.keys):
            raise InputError(f"keys.{name}: a search cannot vary it; {nearest(name, [])}")
    for name, values in probes(search.keys):
        try:
            search.recipe_with(values, search.output / "trials")
        except InputError as error:
            shown = strict_json(values.get(name))
            raise InputError(f"keys.{name} (at {shown}): {error}") from None
    if search.sampler.name == "grid":
        grid_of(search.keys)
    if search.sampler.name == "cma" and len(search.objectives) > 1:
        raise InputError("sampler: cma goes by one objective; take tpe or random for several")
    if search.confirm is not None:
        if len(search.objectives) > 1:
            raise InputError("confirm: several objectives have no one winner; leave it out, or name one objective")
        some = next(probes(search.keys))[1]
        try:
            check_topology(confirmed_recipe(search, some, search.output / "confirm"), "")
        except InputError as error:
            raise InputError(f"confirm: {error}") from None


def confirmed_recipe(search: Search, values: Mapping[str, Any], output: Path) -> Recipe:
    """The recipe of a confirmation of these values."""
    assert search.confirm is not None
    return search.recipe_with({**values, "topology.kind": search.confirm.topology, **search.confirm.values}, output)
