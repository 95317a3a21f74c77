"""Moving a trainable state between its flat buffer and the live parameters of a model.

Under DeepSpeed the float32 master copies are the truth and the live parameters follow them, so both are written
(a write to only one of the two is silently undone, at once or by the next step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from core_training.foundation.errors import ProtocolError
from core_training.foundation.state import Manifest, TrainableState

Parameters = Mapping[str, Any]
"""Live parameters by canonical name, in manifest order."""


def trainable_parameters(model: nn.Module) -> dict[str, Any]:
    """The parameters that are trained, by canonical name, sorted: the buffer order of the manifest."""
    named = {_canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


def all_parameters(model: nn.Module) -> dict[str, Any]:
    """All of a model's parameters, each once, in the same form."""
    return dict(sorted((_canonical(name), parameter) for name, parameter in model.named_parameters()))


def other_names(model: nn.Module) -> dict[str, str]:
    """Further names of trained parameters that stand in several places of the model: name: its canonical name."""
    places = [(_canonical(n), p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    canonical = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    return {name: canonical[id(p)] for name, p in places if name != canonical[id(p)]}


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a model's files hold, such as a router's bias, by canonical name, sorted."""
    saved = model.state_dict().keys()
    return dict(sorted((_canonical(name), buffer) for name, buffer in model.named_buffers() if name in saved))


def as_array(buffer: torch.Tensor) -> npt.NDArray[Any]:
    """A buffer's values, as float32, int64 or bool."""
    if buffer.is_floating_point():
        buffer = buffer.float()
    elif buffer.dtype != torch.bool:
        buffer = buffer.long()
    return buffer.detach().cpu().numpy()


def write_buffers(model: nn.Module, values: Mapping[str, npt.NDArray[Any]]) -> None:
    """Make the buffers of these names hold these values. Raises ProtocolError for values of another shape."""
    buffers = persistent_buffers(model)
    for name, array in values.items():
        if array.shape != tuple(buffers[name].shape):
            raise ProtocolError(f"buffer '{name}' has shape {array.shape}, the model's {tuple(buffers[name].shape)}")
        buffers[name].copy_(torch.from_numpy(array))


def manifest_of(parameters: Parameters) -> Manifest:
    """The manifest of these parameters' state."""
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
    if deepspeed_engine is not None:
        # ZeRO-3 fetches ahead for a forward that may not come; a parameter on its way has no memory to write to.
        deepspeed_engine.empty_partition_cache()
    with torch.no_grad():
        for (_, view), parameter in zip(state.tensors(), parameters.values(), strict=True):
            value = torch.from_numpy(view)
            mastered = deepspeed_engine is not None and _write_master(parameter, value)
            with _gathered(parameter):
                parameter.copy_(value)
        # Where master copies cannot be written one by one, they are made anew, with the precision of the parameters.
        if deepspeed_engine is not None and not mastered and hasattr(deepspeed_engine.optimizer, "refresh_fp32_params"):
            deepspeed_engine.optimizer.refresh_fp32_params()


def _canonical(name: str) -> str:
    """A parameter's name as PEFT writes it to files, without its prefix and the adapter's name."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".default.", ".").replace(".default", "")


def _value(parameter: Any, deepspeed_engine: Any) -> torch.Tensor:
    if deepspeed_engine is not None:
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().float().cpu()  # type: ignore[no-any-return]
    with _gathered(parameter):
        return parameter.detach().float().cpu().clone()  # type: ignore[no-any-return]


def _write_master(parameter: Any, value: torch.Tensor) -> bool:
    """Write the float32 copy from which DeepSpeed makes the parameter, if there is one within reach."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    if hasattr(parameter, "ds_id"):
        # DeepSpeed's own way to write a whole parameter fails where its size is no multiple of the number of ranks.
        part = torch.zeros_like(safe_get_local_fp32_param(parameter))
        mine = torch.split(value.flatten(), part.numel())[torch.distributed.get_rank() :][:1]
        for values in mine:
            part[: values.numel()] = values
        safe_set_local_fp32_param(parameter, part)
        return True
    if safe_get_full_fp32_param(parameter) is None:
        return False
    safe_set_full_fp32_param(parameter, value.to(parameter.device))
    return True


@contextmanager
def _gathered(parameter: Any) -> Iterator[None]:
    """Gather the parameter under ZeRO-3, where each rank holds a part; elsewhere do nothing."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    # modifier_rank 0: rank 0's value is broadcast to the others' shards when the context ends.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
