"""The steps that a server takes from a round's start towards its mean: a light file here and a class in
`strategies.outer_steps` for each, in one table."""

from __future__ import annotations

from typing import Any

from core_training.parts.outer_steps.adagrad import ADAGRAD
from core_training.parts.outer_steps.adam import ADAM
from core_training.parts.outer_steps.feddyn import FEDDYN
from core_training.parts.outer_steps.fedexp import FEDEXP
from core_training.parts.outer_steps.momentum import MOMENTUM
from core_training.parts.outer_steps.nesterov import NESTEROV
from core_training.parts.outer_steps.none import NONE
from core_training.parts.outer_steps.outer_step_part import OuterStepPart
from core_training.parts.outer_steps.yogi import YOGI
from core_training.parts.registry import Registry

OUTER_STEPS: Registry[OuterStepPart[Any]] = Registry(
    OuterStepPart,
    "fedloom.outer_steps",
    [NONE, MOMENTUM, NESTEROV, ADAGRAD, ADAM, YOGI, FEDEXP, FEDDYN],
    reserved=("step", "learning_rate", "momentum", "betas", "tau", "step_part", "rate", "used"),
)
