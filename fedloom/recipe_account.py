"""A recipe's run in a few plain lines, and the settings that should make one pause. Loads no model and no data."""

from __future__ import annotations

from pathlib import Path

from core_training.data.formats import column_sets
from core_training.data.records import data_files
from core_training.engine.deepspeed_config import deepspeed_config
from core_training.engine.memory import Memory, estimated_memory
from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.models.shapes import hidden_size
from core_training.parts.section import Section
from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.learning_rate import USUAL_WIDTH, for_sites, learning_rate_of
from core_training.recipe.schema import Recipe
from core_training.recipe.site_groups import bearable
from core_training.recipe.site_shares import NEARLY_ALL, said_of_one_that_holds

_MANY_LOCAL_STEPS, _MUCH_MOMENTUM, _MANY_ROUNDS = 20, 0.8, 100
_HEADS = {"score": "the reward head", "value_head": "the value head"}


def account_of(recipe: Recipe, reaches: str | None = None) -> dict[str, str]:
    """The run's start, training, data, loss and steps; in this order, by a word for each.

    `reaches` says what of the model adapters stand on, where there are any.
    """
    account = {
        "starts from": _start(recipe),
        "trains": _trained(recipe),
        **({"reaches": reaches} if reaches else {}),
        "reads": ", or ".join("+".join(columns) for columns in column_sets(recipe.stage)),
        "minimises": f"a mean over {recipe.stage_part.unit}{_weight(recipe)}",
        "steps": _steps(recipe),
    }
    if recipe.tries_groups:
        account["bears"] = _borne(recipe)
    if recipe.stage_part.samples:
        rollout = recipe.rollout
        judge = f"reward model {rollout.reward_model}" if rollout.reward_model else _functions(rollout.reward_functions)
        account["samples"] = f"answers of up to {rollout.max_new_tokens} tokens, judged by {judge}"
    return account


def memory_of(recipe: Recipe) -> tuple[str, Memory | None]:
    """The memory that the run will take on a CPU, in words and in bytes; or why that is not known before it runs."""
    try:
        memory = estimated_memory(recipe)
    except InputError as error:
        return f"not estimated: {error}", None
    parts = {"weights": memory.weights, "a step": memory.step, "what is trained": memory.trained}
    parts["libraries"] = memory.libraries
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    first = f"up to {_gib(memory.peak)} GiB on a CPU" + ("" if recipe.topology.kind == "central" else ", at each site")
    if memory.peak > memory.training:
        return f"{first}, while the model is loaded; then {_gib(memory.training)}: {listed}", memory
    return f"{first}: {listed}", memory


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 / 20 else f"{size / 2**30:.2f}"


def _functions(weights: dict[str, float]) -> str:
    if len(weights) == 1:
        return f"function {next(iter(weights))}"
    return "functions " + " + ".join(f"{weight:g} × {name}" for name, weight in weights.items())


def warnings_of(recipe: Recipe) -> list[str]:
    """Settings that are allowed, and yet likely not wanted."""
    warnings = []
    zero = (deepspeed_config(recipe) or {}).get("zero_optimization", {})
    if recipe.tuning_part.unquantised is not None and zero.get("stage") == 3:
        warnings.append(
            f"tuning.mode {recipe.tuning.mode} with ZeRO 3 works on CPUs, but is known for trouble on GPUs; "
            "use deepspeed.stage 2"
        )
    warnings += [f"{key}: without effect under {where}" for key, where in _idle(recipe)]
    return warnings + (_what_stalls(recipe) if recipe.topology.kind != "central" else [])


def _what_stalls(recipe: Recipe) -> list[str]:
    """What is known to learn little over several sites; docs/results.md has the figures."""
    topology, outer = recipe.topology, recipe.aggregation.outer
    rounds, warnings = topology.rounds or 0, []
    if rounds > 1 and (topology.local_steps or 0) > _MANY_LOCAL_STEPS:
        warnings.append(
            f"topology.local_steps: in {topology.local_steps} steps between two exchanges the sites drift apart; more "
            "rounds of 5 learn more in as many steps"
        )
    if topology.local_seconds is not None:
        warnings.append(
            "topology.local_seconds: how many steps a site takes goes by its speed, so no second run gives the same; "
            "by local_steps or local_epochs it does"
        )
    if (outer.momentum or 0) >= _MUCH_MOMENTUM and rounds < _MANY_ROUNDS:
        warnings.append(
            f"aggregation.outer.momentum: {outer.momentum:g} wants hundreds of rounds, and these are {rounds}; "
            "0.5 learns more in few"
        )
    if outer.step_part.reads_norms and recipe.training.learning_rate is None:
        warnings.append(
            f"training.learning_rate: unset it goes with the number of sites, and {outer.step} goes further by itself; "
            "give what one site would take"
        )
    if outer.step_part.betas is not None and outer.learning_rate == outer.step_part.learning_rate:
        warnings.append(
            f"aggregation.outer.learning_rate: {outer.step} moves each value by about it a round, whatever the sites "
            "learnt, and the usual one is no more than a guess; search for it, or leave the step out"
        )
    return [*warnings, *_what_one_site_holds(recipe)]


def _what_one_site_holds(recipe: Recipe) -> list[str]:
    """What follows where nearly all records of a simulation are one site's, by the sizes of the files."""
    sites = recipe.simulation.sites or {}
    if recipe.topology.local_epochs is not None:  # who has more records takes more steps
        return []
    files = list(sites.values()) if isinstance(sites, dict) else sites
    try:
        sizes = [sum(path.stat().st_size for path in data_files(site)) for site in files]
    except (InputError, OSError):  # said when they are read
        return []
    largest = max(sizes, default=0)
    if len(sizes) < 2 or not largest or largest < NEARLY_ALL * sum(sizes):
        return []
    return [said_of_one_that_holds(str(files[sizes.index(largest)]), largest / sum(sizes))]


def _borne(recipe: Recipe) -> str:
    """The poisoned sites that a gate of groups bears, and what it costs; where the sites are not known, of some."""
    least, simulation = recipe.least_group, recipe.simulation
    given = len(simulation.sites) if isinstance(simulation.sites, dict) else simulation.count
    known = recipe.topology.sites or given
    examples = [known] if known is not None else [max(recipe.needed_sites, count * least) for count in (3, 5, 8)]
    parts = {count: recipe.groups_among(recipe.topology.in_round(count)) for count in examples}
    each = f"of {least} or more" if least > 1 else "of one or more"
    told = [f"{bearable(groups)} poisoned of {count} sites in {groups} groups" for count, groups in parts.items()]
    return (
        f"{', '.join(told)} {each}, drawn anew each round; each site tries the mean of every group on its held-out "
        "records, in every round"
    )


def _weight(recipe: Recipe) -> str:
    if recipe.topology.kind == "central":
        return ""
    weights = {
        "loss_units": "as many of them as it was trained on",
        "records": "as much as its training records",
        "sqrt_records": "as much as the root of its training records",
        "equal": "as much as any other's",
        "given": "what aggregation.site_weights says",
    }
    return f"; a site's update weighs {weights[recipe.aggregation.weights]}"


def _start(recipe: Recipe) -> str:
    start = f"{recipe.model.name_or_path} in {recipe.model.dtype}"
    if recipe.model.adapters:
        start += f", with {', '.join(recipe.model.adapters)} merged in"
    return start + ("; that is the reference policy of the whole run" if recipe.stage_part.refers else "")


def _trained(recipe: Recipe) -> str:
    trained = recipe.tuning_part.trains(recipe.tuning)
    if head := recipe.stage_part.head:
        trained += f", and {_HEADS[head]}"
    return trained if recipe.topology.kind == "central" else f"{trained}; {recipe.aggregation.sharing_part.travels}"


def _steps(recipe: Recipe) -> str:
    training, topology = recipe.training, recipe.topology
    passes = f"{training.num_train_epochs:g} passes over the data"
    count = passes if recipe.total_steps is None else f"{recipe.total_steps} steps"
    if topology.kind != "central":
        count = _steps_of_rounds(recipe)
    width = _width(recipe)
    rate = f"{learning_rate_of(recipe, width):.3g}"
    return f"{count} of {training.optim}, at a learning rate of up to {rate}{_why_this_rate(recipe, width)}"


def _steps_of_rounds(recipe: Recipe) -> str:
    """How far each site goes in all rounds."""
    topology = recipe.topology
    if topology.local_epochs is not None:
        return f"{topology.rounds} rounds, each of {topology.local_epochs:g} passes over a site's own records, in steps"
    if topology.local_seconds is not None:
        return f"{topology.rounds} rounds, each of {topology.local_seconds:g} s at each site, in steps"
    return f"{recipe.total_steps} steps at each site, in {topology.rounds} rounds of {topology.local_steps}"


def _width(recipe: Recipe) -> int | None:
    """The width of the recipe's model, if it is on this machine."""
    try:
        return hidden_size(find_model(recipe.model.name_or_path) or Path(recipe.model.name_or_path))
    except InputError:
        return None


def _why_this_rate(recipe: Recipe, width: int | None) -> str:
    if recipe.training.learning_rate is not None:
        return ""
    why = f", as is usual for {recipe.stage} with {recipe.tuning.mode} at a width of {width or USUAL_WIDTH:,}"
    if width is None:
        why += " (the model is not here: a narrower one gets more)"
    if recipe.topology.kind == "central":
        return why
    if (sites := recipe.topology.sites) is not None:
        in_round = recipe.topology.in_round(sites)
        return f"{why}, times {for_sites(in_round):.2g} for {in_round} sites{' a round' if in_round != sites else ''}"
    return f"{why}; times the root of the number of sites, once that is known"


def _idle(recipe: Recipe) -> list[tuple[str, str]]:
    """Sections that say something, to no effect: those of other stages and tuning modes."""
    stage, mode = f"stage {recipe.stage}", f"tuning.mode {recipe.tuning.mode}"
    sections: list[tuple[str, Section, bool, str]] = [
        ("rollout", recipe.rollout, recipe.stage_part.samples, stage),
        *((name, section, name == recipe.stage, stage) for name, section in recipe.sections_of(STAGES)),
        *(
            (f"tuning.{name}", section, name in recipe.tuning_part.sections, mode)
            for name, section in recipe.tuning.sections_of(TUNING_MODES)
        ),
    ]
    idle = [(key, where) for key, section, used, where in sections if not used and section != type(section)()]
    if recipe.training.lr_scheduler_type == "constant" and (
        recipe.training.warmup_steps or recipe.training.warmup_ratio
    ):
        idle.append(("training.warmup_steps", "lr_scheduler_type constant (constant_with_warmup has a warm-up)"))
    return idle
