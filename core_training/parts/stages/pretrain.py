"""Pre-training: every token of a text is learnt."""

from __future__ import annotations

from core_training.parts.data_kinds import TEXT
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart

PRETRAIN = StagePart[Section](
    name="pretrain",
    target="core_training.stages.pretrain:Pretrain",
    reads=TEXT,
    unit="tokens",
    negative=False,
    learning_rate=2e-5,
    adapter_learning_rate=2e-4,
    packs=True,
)
