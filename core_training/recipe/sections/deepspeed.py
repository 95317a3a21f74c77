"""The section `deepspeed`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from core_training.parts.section import PositiveInt, Section


class DeepSpeed(Section):
    """A DeepSpeed group: ZeRO data parallelism over its processes, on one machine or several.

    One process trains without DeepSpeed, unless another key says otherwise.
    """

    processes: PositiveInt = Field(1, description="Processes of the group, on all its machines.")
    stage: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage; in bfloat16, 0 runs as 1.")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="What moves to CPU memory: nothing, the optimizer, or (ZeRO 3) the parameters too."
    )
    config: str | None = Field(None, description="A DeepSpeed JSON file, used instead of the keys above.")

    def check(self) -> None:
        """Raise ValueError for what DeepSpeed does not do, or would not be asked to."""
        if self.offload == "all" and self.stage != 3:
            raise ValueError("deepspeed.offload: 'all' needs deepspeed.stage 3; ZeRO 1 and 2 offload the 'optimizer'")
        if self.offload == "optimizer" and self.stage == 0:
            raise ValueError("deepspeed.offload: ZeRO 0 moves nothing; 'optimizer' needs deepspeed.stage 1, 2 or 3")

    @property
    def used(self) -> bool:
        """Whether DeepSpeed is: for several processes, or for what its stages and offloading do for one."""
        return self != DeepSpeed()
