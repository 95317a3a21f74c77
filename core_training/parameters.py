"""Moving a trainable state between its flat buffer and the live parameters of a model.

Under DeepSpeed the float32 master copies are the truth and the live parameters follow them, so both are written
(a write to only one of the two is silently undone, at once or by the next step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from core_training.state import Manifest, TrainableState

Parameters = Mapping[str, Any]
"""Live parameters by canonical name, in manifest order."""


def manifest_of(parameters: Parameters) -> Manifest:
    """What a state of these parameters holds."""
    # Under ZeRO-3 a parameter's own shape is empty while it is not gathered.
    return Manifest.of({name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()})


def read_parameters(parameters: Parameters, deepspeed_engine: Any = None) -> TrainableState:
    """The present values of the parameters, as float32. Under DeepSpeed every rank must call this."""
    manifest = manifest_of(parameters)
    state = TrainableState(manifest, np.empty(manifest.size, dtype=np.float32))
    for (_, view), parameter in zip(state.tensors(), parameters.values(), strict=True):
        torch.from_numpy(view).copy_(_value(parameter, deepspeed_engine))
    return state


def write_parameters(parameters: Parameters, state: TrainableState, deepspeed_engine: Any = None) -> None:
    """Make the parameters hold `state`. Under DeepSpeed every rank must call this with the same state."""
    with torch.no_grad():
        for (_, view), parameter in zip(state.tensors(), parameters.values(), strict=True):
            value = torch.from_numpy(view)
            if deepspeed_engine is not None:
                _write_master(parameter, value)
            with _gathered(parameter):
                parameter.copy_(value)
        if deepspeed_engine is not None and hasattr(deepspeed_engine.optimizer, "refresh_fp32_params"):
            deepspeed_engine.optimizer.refresh_fp32_params()


def _value(parameter: Any, deepspeed_engine: Any) -> torch.Tensor:
    if deepspeed_engine is not None:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().cpu()  # type: ignore[no-any-return]
    with _gathered(parameter):
        return parameter.detach().float().cpu().clone()  # type: ignore[no-any-return]


def _write_master(parameter: Any, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    if safe_get_full_fp32_param(parameter) is not None:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))


@contextmanager
def _gathered(parameter: Any) -> Iterator[None]:
    """Whole parameters under ZeRO-3, where each rank holds a part; elsewhere nothing."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    # modifier_rank 0: rank 0's value is broadcast to the others' shards when the context ends.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
