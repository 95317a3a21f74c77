"""Which of a recipe's keys do not go together with masks, codecs and differential privacy."""

from __future__ import annotations

from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.recipe_keys import RecipeKeys


def check_differential_privacy(recipe: RecipeKeys) -> None:
    if "weights" not in recipe.aggregation.model_fields_set:
        # The weight that is usual would tell how many tokens were drawn.
        recipe.__dict__.update(aggregation=recipe.aggregation.model_copy(update={"weights": "equal"}))
    for wrong, key, why in _undoing_privacy(recipe):
        if wrong:
            raise ValueError(f"{key}: under privacy.differential_privacy {why}")


def check_codec(recipe: RecipeKeys) -> None:
    privacy, aggregation = recipe.privacy, recipe.aggregation
    in_gossip, in_ring = recipe.topology.kind == "gossip", privacy.ring_bits is not None
    if in_gossip and in_ring and not aggregation.mixing_part.is_weighted_mean:
        raise ValueError(
            f"privacy.codec: {privacy.codec} carries sums, and mixing '{aggregation.mixing}' needs each "
            "neighbour's state by itself; choose mixing 'group', or codec fp32 or bf16 without secure aggregation"
        )
    if in_gossip and (aggregation.rule_part.needs_each_update or aggregation.rule_part.in_groups):
        raise ValueError(
            f"aggregation.rule: '{aggregation.rule}' is a server's, and gossip nodes average by "
            "aggregation.mixing, which no rule guards; choose rule 'fedavg', or topology.kind 'federated'"
        )
    sums_do = aggregation.rule_part.is_weighted_mean or aggregation.rule_part.in_groups
    if not in_gossip and in_ring and not sums_do:
        raise ValueError(
            f"privacy.codec: {privacy.codec} carries sums, and rule '{aggregation.rule}' needs each site's "
            "state by itself; choose rule 'fedavg', or codec fp32 or bf16 without secure aggregation"
        )
    if privacy.secure and (key := _opens_one_sites_part(recipe)):
        raise ValueError(
            f"{key}: with it the sum of the updates could tell one site's part, which nobody is to know under "
            "privacy.secure_aggregation; leave out one of them"
        )
    if aggregation.max_update_norm is not None and in_ring and (in_gossip or privacy.secure):
        raise ValueError(
            "aggregation.max_update_norm: nobody sees a single update of this run, whose sums alone are known; set "
            "privacy.clip, the most that one value may change"
        )
    if privacy.keep < 1 and aggregation.scaffold:
        raise ValueError(
            "privacy.keep: SCAFFOLD takes how far the mean moved, so all of it has to travel; leave it out"
        )
    if privacy.keep < 1 and in_gossip and not in_ring:
        raise ValueError(
            f"privacy.keep: gossip nodes send {privacy.codec} changes since the start of the run; choose a ring codec"
        )


def _opens_one_sites_part(recipe: RecipeKeys) -> str | None:
    """The key that singles out sites by name, in what they add to a sum; None where there is none."""
    if recipe.topology.judged_by:
        return "topology.judged_by"
    if recipe.aggregation.weights == "given":
        return "aggregation.site_weights"
    return "tuning.lora.site_ranks" if recipe.tuning.settings(LORA).site_ranks and recipe.trains_parts else None


def _undoing_privacy(recipe: RecipeKeys) -> list[tuple[bool, str, str]]:
    """What cannot go together with differential privacy: whether the recipe has it, the key, and why not."""
    training, topology, terms = recipe.training, recipe.topology, recipe.privacy.differential_privacy
    by_held_out = "nothing goes by held-out records, which the noise does not cover; leave it out"
    level = _undoing_privacy_of_sites if terms is not None and terms.of_sites else _undoing_privacy_of_records
    return [
        *level(recipe),
        (
            recipe.tries_groups,
            f"aggregation.rule: {recipe.aggregation.rule}",
            "nothing goes by held-out records, which the noise does not cover; choose fedavg",
        ),
        (
            topology.own_pace is not None,
            topology.own_pace or "",
            "what a round releases is counted in steps that the recipe names; give topology.local_steps",
        ),
        (topology.early_stopping_patience is not None, "topology.early_stopping_patience", by_held_out),
        (training.load_best_model_at_end, "training.load_best_model_at_end", by_held_out),
        (bool(topology.judged_by), "topology.judged_by", by_held_out),
        (
            topology.own_steps is not None and topology.kind != "central",
            "topology.own_steps",
            "a site's own model would be another release; leave it out",
        ),
    ]


def _undoing_privacy_of_records(recipe: RecipeKeys) -> list[tuple[bool, str, str]]:
    training, part = recipe.training, recipe.stage_part
    return [
        (
            part.samples or part.rows_compared is not None,
            "stage",
            f"the loss must be a sum over records, and that of {recipe.stage} is not; choose pretrain, sft, reward, "
            "dpo, orpo or simpo",
        ),
        (bool(training.packing), "training.packing", "each record has a row of its own; leave it out"),
        (
            recipe.tuning_part.has_factors and bool(recipe.tuning.settings(LORA).site_ranks),
            "tuning.lora.site_ranks",
            "each unit's gradient is clipped as a whole; leave it out",
        ),
        (recipe.deepspeed.used, "deepspeed", "each unit's gradient is needed by itself, which DeepSpeed does not give"),
        (training.torch_compile, "training.torch_compile", "a compiled model does not give each unit's gradient"),
        (recipe.data.cache is not None, "data.cache", "whose a record is has to be read with it; leave it out"),
        (bool(recipe.data.mix), "data.mix", "one record more or less would have others drawn; leave it out"),
        (
            recipe.data.max_samples is not None,
            "data.max_samples",
            "one record more or less would bring in another; leave it out",
        ),
        (
            bool(recipe.model.router_aux_loss_coef),
            "model.router_aux_loss_coef",
            "each unit's loss must be its own, and a balance is one of all that are computed together; leave it out",
        ),
        (
            recipe.aggregation.weights == "loss_units" and recipe.topology.kind != "central",
            "aggregation.weights",
            "a weight must not tell what was drawn, and loss_units does; choose equal, given or records",
        ),
    ]


def _undoing_privacy_of_sites(recipe: RecipeKeys) -> list[tuple[bool, str, str]]:
    privacy = recipe.privacy
    return [
        (
            recipe.topology.kind == "central",
            "topology.kind",
            "of level site there are sites that sum up; choose federated or gossip, or level: record",
        ),
        (
            privacy.secure is None,
            "privacy.secure_aggregation",
            "of level site each site adds a share of the noise, which hides it in a masked sum alone; set it to true",
        ),
        (recipe.aggregation.weights != "equal", "aggregation.weights", "of level site all weigh the same; set equal"),
        (
            privacy.clip is not None,
            "privacy.clip",
            "of level site it follows from differential_privacy.clip; leave it out",
        ),
    ]
