"""Which of a recipe's keys do not go together, and what to do about it."""

from __future__ import annotations

from core_training.parts.data_kinds import CONVERSATION
from core_training.recipe.combinations_of_rounds import check_rounds
from core_training.recipe.combinations_with_privacy import check_differential_privacy
from core_training.recipe.recipe_keys import RecipeKeys

_BY_NUMBERS_OF_STEPS = ("inverse_sqrt", "warmup_stable_decay")
"""The schedules that go by a number of steps, not by the share of the run that is over."""


def check_combinations(recipe: RecipeKeys) -> None:
    """Raise ValueError, naming the key and what would be right, for keys that do not go together.

    Sets what follows from others and was not given.
    """
    _check_stage(recipe)
    if recipe.privacy.differential_privacy is not None:
        check_differential_privacy(recipe)
    if recipe.topology.own_pace is not None:
        _check_pace(recipe, recipe.topology.own_pace)
    if recipe.topology.kind != "central":
        check_rounds(recipe)
    if recipe.judges_by_held_out is not None and recipe.data.eval is None and recipe.data.eval_fraction == 0:
        key = recipe.judges_by_held_out
        raise ValueError(f"{key}: no records are held out to judge by; give data.eval or data.eval_fraction")
    recipe.deepspeed.check()
    if recipe.simulation.sites is not None and not recipe.simulation.sites:
        raise ValueError("simulation.sites: name at least one site's file")
    if recipe.simulation.sites is not None and recipe.simulation.partition is not None:
        raise ValueError("simulation: give either 'sites' or 'partition', not both")
    if recipe.simulation.partition in ("iid", "dirichlet", "size_skew") and recipe.simulation.count is None:
        raise ValueError(f"simulation.count: partition '{recipe.simulation.partition}' needs the number of sites")
    if recipe.simulation.partition in ("dirichlet", "natural") and recipe.simulation.by is None:
        raise ValueError(f"simulation.by: partition '{recipe.simulation.partition}' needs a column to divide by")


def _check_stage(recipe: RecipeKeys) -> None:
    part = recipe.stage_part
    judges = [name for name in ("reward_model", "reward_function") if getattr(recipe.rollout, name) is not None]
    if part.samples and len(judges) != 1:
        raise ValueError(
            f"rollout: stage {recipe.stage} needs something that judges answers; give either reward_model (the run "
            "folder of a run of stage reward) or reward_function (FILE.py:name)"
        )
    if part.rows_compared is not None and recipe.training.per_device_train_batch_size < 2:
        raise ValueError(
            f"training.per_device_train_batch_size: stage {recipe.stage} {part.rows_compared}; give 2 or more"
        )
    if recipe.model.router_aux_loss_coef and not part.packs:
        raise ValueError(
            f"model.router_aux_loss_coef: it is for the stages pretrain and sft, not for stage {recipe.stage}"
        )
    if recipe.training.neftune_noise_alpha and part.samples:
        raise ValueError(
            f"training.neftune_noise_alpha: stage {recipe.stage} compares the policy with what it was without noise; "
            "leave it out"
        )
    if recipe.data.loss_on != "answers" and part.reads is not CONVERSATION:
        raise ValueError(f"data.loss_on: it is for conversations, as of stage sft, not for stage {recipe.stage}")
    if recipe.training.packing and not part.packs:
        raise ValueError(f"training.packing: examples of stage {recipe.stage} cannot share a row; leave it out")


def _check_pace(recipe: RecipeKeys, key: str) -> None:
    """Refuse what needs every site to take as many steps in a round, and all to know how many."""
    by_time = recipe.topology.local_seconds is not None
    if recipe.topology.kind == "central":
        if by_time and recipe.training.max_steps is None:
            raise ValueError(f"{key}: a central run has no rounds that time could end; give training.max_steps")
        return
    if by_time and recipe.deepspeed.used:
        raise ValueError(f"{key}: the processes of a DeepSpeed group have a clock each; leave out deepspeed")
    if recipe.topology.kind == "gossip" and not by_time:
        raise ValueError(
            f"{key}: gossip nodes do not know each other's records, and so not how much one can have learnt from; "
            "give local_steps or local_seconds"
        )
    if recipe.privacy.ring_bits is not None:
        raise ValueError(
            f"{key}: {recipe.privacy.codec} is written on a scale that follows from the steps between two exchanges, "
            "which all have to know; give local_steps, or codec fp32 or bf16 without secure aggregation"
        )
    if recipe.aggregation.scaffold:
        raise ValueError(f"{key}: SCAFFOLD takes all sites to have gone as many steps; give local_steps")
    if recipe.training.warmup_steps:
        raise ValueError(
            f"training.warmup_steps: by {key} no two sites take as many steps; give a share of them, below 1"
        )
    if (schedule := recipe.training.lr_scheduler_type) in _BY_NUMBERS_OF_STEPS:
        raise ValueError(
            f"training.lr_scheduler_type: {schedule} goes by a number of steps, and by {key} no two sites take as "
            "many; choose constant_then_linear, linear or cosine"
        )
