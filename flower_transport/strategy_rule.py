"""A Flower strategy as an aggregation rule: its `aggregate_train` makes the next state of a round's updates.

The strategy is made anew for each round. What it remembers from round to round, which are arrays like the model's
(moments, momentum), is taken out of it and put back, so it is committed, restored and taken back with the state. One
that remembers anything else is refused: it would forget that at a restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.foundation.state import Manifest, TrainableState
from core_training.parts.aggregation_rules.flower import Flower
from flower_transport.records import MESSAGE_TYPE
from strategies.outer_steps.outer_step import Memory
from strategies.robust_rules.kept_updates import KeptUpdates

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message

_ARRAYS, _METRICS, _WEIGHT = "arrays", "metrics", "num-examples"
_LISTED, _NAMED = "list-", "dict-"
"""How a strategy holds what it remembers: as arrays in the model's order, or by name."""


class FlowerStrategy(KeptUpdates):
    """One round of a strategy; `memory` is what it remembered of the rounds before, and after `result` of this one."""

    def __init__(
        self, manifest: Manifest, start: TrainableState, memory: Memory, number: int, settings: Flower
    ) -> None:
        super().__init__(manifest)
        self._start = start
        self._number = number
        self._strategy = _made(settings)
        self.memory = memory
        for name, state in memory.items():
            arrays = dict(state.tensors())
            kind, attribute = name[: len(_LISTED)], name[len(_LISTED) :]
            setattr(self._strategy, attribute, arrays if kind == _NAMED else list(arrays.values()))

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        from flwr.app import ArrayRecord, ConfigRecord

        name = type(self._strategy).__name__
        before = _plain(self._strategy)
        nodes = list(range(1, len(states) + 1))
        try:
            # Some strategies note here what the round begins with; whom they would ask is not asked.
            for _ in self._strategy.configure_train(self._number, _record(self._start), ConfigRecord(), _Nodes(nodes)):
                pass
            arrays, _ = self._strategy.aggregate_train(self._number, list(map(_reply, nodes, states, weights)))
        except Exception as error:
            raise ProtocolError(f"aggregation.flower: {name} fails: {type(error).__name__}: {error}") from error
        if not isinstance(arrays, ArrayRecord):
            raise ProtocolError(f"aggregation.flower: {name} made no state of {len(states)} updates")
        after = self._read(name, {key: array.numpy() for key, array in arrays.items()})
        if forgotten := sorted(key for key, value in _plain(self._strategy).items() if before.get(key, value) != value):
            raise RunError(
                f"aggregation.flower: {name} remembers '{forgotten[0]}', which is no set of arrays like the model's, "
                "and would be forgotten at a restart; choose another strategy"
            )
        self.memory = self._remembered(after)
        return after

    def _remembered(self, after: TrainableState) -> Memory:
        """What the strategy holds besides the states that the run has anyway."""
        known, memory = {self._start.digest, after.digest}, {}
        for attribute, value in sorted(vars(self._strategy).items()):
            if (arrays := self._like_the_model(value)) is not None:
                state = TrainableState.from_arrays(arrays, self.manifest)
                if state.digest not in known:
                    memory[f"{_NAMED if isinstance(value, Mapping) else _LISTED}{attribute}"] = state
        return memory

    def _like_the_model(self, value: Any) -> dict[str, npt.NDArray[np.float32]] | None:
        names = [spec.name for spec in self.manifest.tensors]
        if isinstance(value, Mapping):
            if set(value) != set(names):
                return None
            value = [value[name] for name in names]
        if not isinstance(value, list) or len(value) != len(names):
            return None
        if not all(isinstance(array, np.ndarray) for array in value):
            return None
        shapes = [spec.shape for spec in self.manifest.tensors]
        if [array.shape for array in value] != shapes:
            return None
        return {name: np.asarray(array, dtype=np.float32) for name, array in zip(names, value, strict=True)}

    def _read(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> TrainableState:
        state = TrainableState.from_arrays(
            {key: np.asarray(array, dtype=np.float32) for key, array in arrays.items()}, self.manifest
        )
        if not state.is_finite():
            raise ProtocolError(f"aggregation.flower: {name} made a state with NaN or infinite values")
        return state


class _Nodes:
    """A grid, so far as a strategy asks it who is there."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes


def _made(settings: Flower) -> Any:
    """The strategy. Raises InputError where there is none of that name, or it cannot be made so."""
    assert settings.strategy is not None, "the recipe was checked"
    from flwr.serverapp.strategy import Strategy

    module, _, name = settings.strategy.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"aggregation.flower.strategy: {settings.strategy}: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise InputError(f"aggregation.flower.strategy: {settings.strategy} is no flwr.serverapp.strategy.Strategy")
    try:
        made = kind(**settings.arguments)
    except (TypeError, ValueError) as error:
        raise InputError(f"aggregation.flower.arguments: {name}: {error}") from None
    for least in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
        if hasattr(made, least):  # how many sites a round takes is the run's to say
            setattr(made, least, 1)
    return made


def _plain(strategy: Any) -> dict[str, Any]:
    """Its attributes that are plain values."""
    return {key: value for key, value in vars(strategy).items() if isinstance(value, bool | int | float | str)}


def _record(state: TrainableState) -> ArrayRecord:
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(view.copy()) for name, view in state.tensors()})


def _reply(node: int, state: TrainableState, weight: float) -> Message:
    """An update as a strategy of Flower's gets it."""
    from flwr.app import Message, MetricRecord, RecordDict

    content = RecordDict({_ARRAYS: _record(state), _METRICS: MetricRecord({_WEIGHT: weight})})
    return Message(content, dst_node_id=node, message_type=MESSAGE_TYPE)
