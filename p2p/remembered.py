"""A node's state with what the outer step remembers of it, as one: so they are committed, offered and handed over.

Where a recipe has no outer step that remembers anything, that is the state itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from core_training.foundation.state import Manifest, TrainableState
from strategies.outer_steps.outer_step import Memory

_PREFIX = "outer."


def whole_manifest(manifest: Manifest, names: Iterable[str]) -> Manifest:
    """The manifest of a state with what is remembered of it under these names."""
    plain = {spec.name: spec.shape for spec in manifest.tensors}
    remembered = {_name(memory, name): shape for memory in names for name, shape in plain.items()}
    return Manifest.of(plain | remembered)


def together(state: TrainableState, memory: Memory) -> TrainableState:
    """Both as one."""
    if not memory:
        return state
    arrays = dict(state.tensors())
    for memory_name, values in memory.items():
        arrays |= {_name(memory_name, name): view for name, view in values.tensors()}
    return TrainableState.from_arrays(arrays, whole_manifest(state.manifest, memory))


def apart(whole: TrainableState, manifest: Manifest, names: Iterable[str]) -> tuple[TrainableState, Memory]:
    """The state, and what is remembered of it under these names."""
    arrays = dict(whole.tensors())
    plain = [spec.name for spec in manifest.tensors]

    def taken(places: Iterable[str]) -> TrainableState:
        return TrainableState.from_arrays(dict(zip(plain, map(arrays.__getitem__, places), strict=True)), manifest)

    names = list(names)
    if not names:
        return whole, {}
    return taken(plain), {memory: taken(_name(memory, name) for name in plain) for memory in names}


def _name(memory: str, tensor: str) -> str:
    return f"{_PREFIX}{memory}.{tensor}"
