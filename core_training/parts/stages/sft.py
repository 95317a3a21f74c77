"""Supervised fine-tuning: the assistant's tokens are learnt."""

from __future__ import annotations

from core_training.parts.data_kinds import CONVERSATION
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart

SFT = StagePart[Section](
    name="sft",
    target="core_training.stages.sft:Sft",
    reads=CONVERSATION,
    unit="tokens",
    negative=False,
    learning_rate=2e-5,
    adapter_learning_rate=2e-4,
    packs=True,
)
