"""Which of a recipe's keys do not go together in rounds of several sites."""

from __future__ import annotations

from typing import Any

from core_training.parts.aggregation_rules import AggregationPart
from core_training.recipe.combinations_with_privacy import check_codec
from core_training.recipe.recipe_keys import RecipeKeys


def check_rounds(recipe: RecipeKeys) -> None:
    """Raise ValueError for what does not go together in rounds of several sites."""
    if recipe.topology.rounds is None:
        raise ValueError(f"topology.rounds: a {recipe.topology.kind} run needs it, a whole number from 1 up")
    if recipe.aggregation.corrects:
        _check_correction(recipe)
    if recipe.aggregation.outer.used:
        _check_outer_step(recipe)
    _check_rule(recipe)
    if recipe.topology.own_steps is not None and recipe.deepspeed.used:
        raise ValueError("topology.own_steps: a DeepSpeed group trains one state; leave out deepspeed")
    if recipe.topology.graph == "one_peer" and recipe.topology.early_stopping_patience is not None:
        raise ValueError(
            "topology.early_stopping_patience: a node of graph one_peer hears one other in a round, and cannot "
            "agree with all when to stop; choose graph exponential, or leave it out"
        )
    if recipe.topology.judged_by and recipe.topology.kind == "gossip":
        raise ValueError(
            "topology.judged_by: gossip nodes agree on when to stop by what each of them sees; leave it out"
        )
    if recipe.topology.sites_per_round is not None:
        _check_participation(recipe, recipe.topology.sites_per_round)
    if recipe.topology.buffer is not None:
        _check_buffer(recipe, recipe.topology.buffer)
    if recipe.trains_parts is not None:
        _check_parts(recipe, recipe.trains_parts)
    if recipe.aggregation.weights in ("records", "sqrt_records"):
        _check_weights(recipe)
    check_codec(recipe)


def _check_weights(recipe: RecipeKeys) -> None:
    key, instead = f"aggregation.weights: {recipe.aggregation.weights}", "choose loss_units, equal or given"
    if recipe.topology.kind == "gossip":
        raise ValueError(f"{key} is more than a gossip node knows of its peers, so they could claim any; {instead}")
    if recipe.privacy.ring_bits is not None:
        raise ValueError(
            f"{key} has no most that the recipe knows, and {recipe.privacy.codec} is written on a scale that has to; "
            f"{instead}, or codec fp32 or bf16 without secure aggregation"
        )


def _check_correction(recipe: RecipeKeys) -> None:
    key = "aggregation.scaffold" if recipe.aggregation.scaffold else "aggregation.proximal_mu"
    if recipe.aggregation.counts_rounds:
        key = f"aggregation.outer.step: {recipe.aggregation.outer.step}"
    if recipe.deepspeed.used:
        raise ValueError(f"{key}: it changes gradients that DeepSpeed keeps to itself; leave out deepspeed")
    if recipe.aggregation.counts_rounds:
        _check_counted_rounds(recipe, key)
        return
    if not recipe.aggregation.scaffold:
        return
    if recipe.aggregation.proximal_mu > 0:
        raise ValueError("aggregation: give either 'proximal_mu' or 'scaffold', not both")
    if recipe.training.optim != "sgd":
        raise ValueError(
            f"{key}: it takes how far a site moved for its gradient, which holds for training.optim 'sgd' only, "
            f"not '{recipe.training.optim}'"
        )
    if recipe.topology.kind == "gossip" and not recipe.aggregation.mixing_part.is_weighted_mean:
        raise ValueError(f"{key}: it needs one mean of all sites, aggregation.mixing 'group'")
    if recipe.topology.kind == "federated" and not recipe.aggregation.rule_part.is_weighted_mean:
        raise ValueError(f"{key}: it needs the mean of all sites, aggregation.rule 'fedavg'")


def _check_counted_rounds(recipe: RecipeKeys, key: str) -> None:
    """Refuse what would part the sum of the sites' changes at the server from what each of them remembers."""
    aggregation, training = recipe.aggregation, recipe.training
    if recipe.topology.kind == "gossip":
        raise ValueError(
            f"{key}: one server keeps the sum of all sites' changes, and tells each which of its own counted; "
            "choose aggregation.scaffold, step nesterov (in a ring), or topology.kind 'federated'"
        )
    if aggregation.scaffold or aggregation.proximal_mu > 0:
        raise ValueError(f"{key}: it corrects local steps itself; leave out aggregation.scaffold and proximal_mu")
    if training.optim != "sgd" or training.optim_args:
        raise ValueError(
            f"{key}: it takes how far a site moved for its gradient, which holds for plain SGD alone; choose "
            "training.optim sgd without optim_args, or step nesterov"
        )
    if not aggregation.rule_part.is_weighted_mean:
        raise ValueError(f"{key}: it needs the mean of all sites, aggregation.rule 'fedavg'")
    if "weights" not in aggregation.model_fields_set:
        recipe.__dict__.update(aggregation=aggregation.model_copy(update={"weights": "equal"}))
    elif aggregation.weights != "equal":
        raise ValueError(
            f"aggregation.weights: {aggregation.weights}: under {key} each site counts as one; choose equal"
        )
    if aggregation.outer.learning_rate != 1:
        raise ValueError(
            f"aggregation.outer.learning_rate: {key} goes as far as the sites' changes say; leave it out, and set "
            "aggregation.outer.feddyn.alpha"
        )
    if recipe.privacy.keep < 1:
        raise ValueError(f"privacy.keep: under {key} all of a change has to travel; leave it out")
    if (dp := recipe.privacy.differential_privacy) is not None and dp.level == "site":
        raise ValueError(
            f"{key}: under differential privacy of level site what the server gets is not what a site remembers "
            "of it; choose step nesterov, or level record"
        )


def _check_participation(recipe: RecipeKeys, sites: float) -> None:
    if recipe.topology.kind == "gossip":
        raise ValueError(
            "topology.sites_per_round: it is a server that draws the sites of a round; leave it out, or choose "
            "topology.graph ring or exponential, in which a node talks to few"
        )
    if isinstance(sites, int) and sites < recipe.needed_sites:
        key = max(recipe.fewest_sites, key=lambda key: recipe.fewest_sites[key])
        raise ValueError(f"topology.sites_per_round: {sites} is less than {key}, {recipe.needed_sites}")
    if recipe.topology.judged_by:
        raise ValueError(
            "topology.judged_by: a round of drawn sites may have none of those who judge; leave out one of them"
        )
    if recipe.topology.asked_beyond and recipe.privacy.secure is not None:
        raise ValueError(
            "topology.asked_beyond: under masks whoever is asked has to be waited for, or its masks to be taken "
            "out; leave it out"
        )


def _check_buffer(recipe: RecipeKeys, updates: int) -> None:
    """Refuse what does not go together with updates that began from different states."""
    key, synchronous = "topology.buffer", "leave it out, or choose topology.sites_per_round"
    if recipe.topology.kind == "gossip":
        raise ValueError(f"{key}: it is a server that gathers updates; leave it out")
    if updates < recipe.needed_sites:
        most = max(recipe.fewest_sites, key=lambda name: recipe.fewest_sites[name])
        raise ValueError(f"{key}: {updates} is less than {most}, {recipe.needed_sites}")
    if recipe.privacy.hides_sites:
        raise ValueError(
            f"{key}: nobody could say beforehand how often a site takes part, and so what its privacy comes to; "
            f"{synchronous}"
        )
    if recipe.aggregation.scaffold or recipe.aggregation.counts_rounds:
        name = "SCAFFOLD" if recipe.aggregation.scaffold else "FedDyn"
        raise ValueError(f"{key}: {name} takes all sites to step from one state; {synchronous}")
    rule, sharing = recipe.aggregation.rule_part, recipe.aggregation.sharing_part
    if rule.needs_rank or sharing.remade_by is not None:
        name = f"rule '{rule.name}'" if rule.needs_rank else f"adapters '{sharing.name}'"
        raise ValueError(
            f"{key}: {name} makes factors anew in each round, and a change of older ones does not fit them; "
            f"{synchronous}"
        )
    if rule.in_groups or rule.needs_steps or rule.remembers:
        raise ValueError(f"{key}: rule '{rule.name}' goes by changes from one state; {synchronous}, or rule 'fedavg'")
    if recipe.topology.judged_by:
        raise ValueError(f"topology.judged_by: a buffer may have none of those who judge; {synchronous}")


def _check_parts(recipe: RecipeKeys, key: str) -> None:
    if not recipe.tuning_part.has_factors:
        raise ValueError(
            f"{key}: it is for the factors of LoRA, and tuning.mode is '{recipe.tuning.mode}'; choose lora or qlora"
        )
    if recipe.deepspeed.used:
        raise ValueError(f"{key}: it leaves parameters alone that DeepSpeed keeps to itself; leave out deepspeed")
    if recipe.aggregation.corrects:
        raise ValueError(f"{key}: proximal_mu, scaffold and feddyn move all that is trained; leave out one of them")
    if recipe.aggregation.sharing_part.keeps_own and recipe.training.load_best_model_at_end:
        raise ValueError(
            f"{key}: a site cannot take its own factor back to the round that was best; leave out "
            "training.load_best_model_at_end"
        )
    if recipe.aggregation.sharing_part.remade_by is not None:
        _check_remade(recipe, key)
    if recipe.aggregation.sharing_part.leaves_alone and recipe.aggregation.outer.step != "none":
        raise ValueError(
            f"{key}: what aggregation.outer remembers moves a factor in the rounds that leave it alone; choose "
            "step none, or adapters both or ffa"
        )


def _check_remade(recipe: RecipeKeys, key: str) -> None:
    """Refuse what goes by factors of the round before; a site's moments of them are let go."""
    if recipe.topology.kind == "gossip":
        raise ValueError(
            f"{key}: one server makes the factors anew, and gossip nodes on unlike machines would come to unlike "
            "bits; choose ffa or rolora, or topology.kind 'federated'"
        )
    if recipe.aggregation.outer.step != "none":
        raise ValueError(
            f"{key}: what aggregation.outer remembers is of the factors before they were made anew; choose step "
            "none, or adapters both or ffa"
        )
    if recipe.aggregation.rule_part.remembers:
        raise ValueError(
            f"{key}: what rule '{recipe.aggregation.rule}' remembers is of the factors before they were made anew; "
            "choose rule 'fedavg', or adapters both or ffa"
        )
    if "keep_optimizer" not in recipe.training.model_fields_set:
        recipe.__dict__.update(training=recipe.training.model_copy(update={"keep_optimizer": False}))
    elif recipe.training.keep_optimizer:
        raise ValueError(
            f"{key}: the optimizer's moments are of the factors before they were made anew; set "
            "training.keep_optimizer to false, or leave it out"
        )


def _check_rule(recipe: RecipeKeys) -> None:
    rule = recipe.aggregation.rule_part
    if rule.in_groups and recipe.topology.kind == "federated":
        _check_groups(recipe, rule)
    for key in rule.required:
        if getattr(recipe.aggregation.settings(rule), key) is None:
            raise ValueError(f"aggregation.{rule.name}.{key}: rule '{rule.name}' needs it")
    if rule.needs_rank:
        _check_factors(recipe, f"aggregation.rule: '{rule.name}'")
    if rule.needs_steps:
        _check_counted_steps(recipe, f"aggregation.rule: '{rule.name}'")
    if not rule.remembers:
        return
    if recipe.aggregation.outer.used:
        raise ValueError(
            f"aggregation.outer: rule '{rule.name}' takes steps of its own, and remembers what they need; leave "
            "out one of them"
        )
    if recipe.aggregation.sharing_part.leaves_alone:
        raise ValueError(
            f"aggregation.adapters: what rule '{rule.name}' remembers may move a factor in the rounds that leave "
            "it alone; choose both, ffa or fedsa"
        )


def _check_counted_steps(recipe: RecipeKeys, key: str) -> None:
    """Refuse steps of which one does not lead as far as the next."""
    training = recipe.training
    if training.optim != "sgd" or training.optim_args:
        raise ValueError(
            f"{key} divides a change by the steps that led to it, which is right for plain SGD alone; under AdamW "
            "it has learnt less than the mean: choose rule 'fedavg', or training.optim sgd without optim_args"
        )
    if recipe.aggregation.proximal_mu > 0:
        raise ValueError(f"{key} takes all steps to lead as far, and proximal_mu holds later ones back; leave it out")


def _check_factors(recipe: RecipeKeys, key: str) -> None:
    """Refuse what does not go together with factors that a server makes anew of their products."""
    if not recipe.tuning_part.has_factors:
        raise ValueError(
            f"{key} is for the factors of LoRA, and tuning.mode is '{recipe.tuning.mode}'; choose rule 'fedavg', or "
            "mode lora or qlora"
        )
    if recipe.trains_parts is not None:
        raise ValueError(f"{key} makes both factors anew, all components; leave out {recipe.trains_parts}")
    if recipe.aggregation.outer.used:
        raise ValueError(
            f"{key} makes factors that are no mean of the sites', and aggregation.outer goes by their "
            "mean; leave out one of them"
        )


def _check_groups(recipe: RecipeKeys, rule: AggregationPart[Any]) -> None:
    key = f"aggregation.rule: {rule.name}"
    if recipe.topology.judged_by:
        raise ValueError(f"topology.judged_by: under {key} every site tries each group's mean; leave out one of them")
    if recipe.topology.asked_beyond:
        raise ValueError(f"topology.asked_beyond: under {key} a round waits for all of a group; leave it out")
    sites = recipe.topology.sites
    if sites is not None and (said := recipe.too_few_for_groups(sites)):
        raise ValueError(said)


def _check_outer_step(recipe: RecipeKeys) -> None:
    in_group = recipe.aggregation.mixing_part.one_state and recipe.privacy.ring_bits is not None
    if recipe.topology.kind == "gossip" and not in_group:
        raise ValueError(
            "aggregation.outer: it steps from one state that all nodes hold, which those of a ring's group make "
            "sure of; choose mixing 'group' and a ring (privacy.codec), or leave it out"
        )
    if recipe.aggregation.outer.step_part.reads_norms:
        _check_norms(recipe, f"aggregation.outer.step: {recipe.aggregation.outer.step}")
    if recipe.aggregation.scaffold:
        raise ValueError(
            "aggregation.outer: SCAFFOLD takes the state that a site gets for the mean of what the sites sent; "
            "leave out one of them"
        )


def _check_norms(recipe: RecipeKeys, key: str) -> None:
    if recipe.topology.kind == "gossip":
        raise ValueError(f"{key} goes by each update's norm, and nodes of a ring's group see their sum alone")
    if recipe.privacy.secure is not None:
        raise ValueError(
            f"{key} goes by each update's norm, which under privacy.secure_aggregation is a site's own word: one "
            "could have the step be of any length; leave out one of them"
        )
    if not recipe.aggregation.rule_part.is_weighted_mean:
        raise ValueError(
            f"{key} goes by the norms of all updates, which rule '{recipe.aggregation.rule}' does not trust; choose "
            "rule 'fedavg', or another step"
        )
