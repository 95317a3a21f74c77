"""A Flower strategy as an aggregation rule: its `aggregate_train` makes the next state of a round's updates.

The strategy is made anew for each round. What it remembers from round to round, which are arrays like the model's
(moments, momentum), is taken out of it and put back, so it is committed, restored and taken back with the state. One
that remembers anything else is refused: it would forget that at a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core_training.foundation.errors import InputError, RunError
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
            arrays = {key: view.copy() for key, view in state.tensors()}  # a strategy may write to what is its own
            kind, attribute = name[: len(_LISTED)], name[len(_LISTED) :]
            setattr(self._strategy, attribute, arrays if kind == _NAMED else list(arrays.values()))

    def _of(self, states: Sequence[TrainableState], weights: Sequence[float]) -> TrainableState:
        from flwr.app import ArrayRecord, ConfigRecord

        strategy, name = self._strategy, type(self._strategy).__name__
        nodes = list(range(1, len(states) + 1))
        try:
            made = _content(strategy)
            # Some strategies note here what the round begins with; whom they would ask is not asked.
            orders = list(strategy.configure_train(self._number, _record(self._start), ConfigRecord(), _Nodes(nodes)))
            configured = _content(strategy)
            arrays, _ = strategy.aggregate_train(self._number, list(map(_reply, nodes, states, weights)))
        except Exception as error:  # whatever somebody's class raises
            raise RunError(f"aggregation.flower: {name} fails: {type(error).__name__}: {error}") from error
        if asked := sorted({key for order in orders for key in _asked_of_sites(order)}):
            raise RunError(
                f"aggregation.flower: {name} asks its sites for '{asked[0]}', of which they know nothing; choose "
                "another strategy (FedProx is aggregation.proximal_mu)"
            )
        if not isinstance(arrays, ArrayRecord):
            raise RunError(f"aggregation.flower: {name} made no state of {len(states)} updates")
        after = self._read(name, {key: array.numpy() for key, array in arrays.items()})
        self.memory = self._remembered(name, made, configured, after)
        return after

    def _remembered(
        self, name: str, made: Mapping[str, str], configured: Mapping[str, str], after: TrainableState
    ) -> Memory:
        """What the round changed in the strategy: arrays like the model's.

        `made` and `configured` are its contents before the round and at its beginning. What the next round's beginning
        sets again from the state is no memory. Raises RunError for anything else.
        """
        memory = {}
        for attribute, content in _content(self._strategy).items():
            if content == made.get(attribute):
                continue
            value = vars(self._strategy)[attribute]
            arrays = self._like_the_model(value)
            state = None if arrays is None else TrainableState.from_arrays(arrays, self.manifest)
            is_set_again = configured.get(attribute) != made.get(attribute)
            if is_set_again and (content == configured[attribute] or (state and state.digest == after.digest)):
                continue
            if state is None or not isinstance(value, dict | list):
                raise RunError(
                    f"aggregation.flower: {name} remembers '{attribute}', which is no list and no mapping of arrays "
                    "like the model's, and would be forgotten at a restart; choose another strategy"
                )
            memory[f"{_NAMED if isinstance(value, dict) else _LISTED}{attribute}"] = state
        return memory

    def _like_the_model(self, value: Any) -> dict[str, npt.NDArray[np.float32]] | None:
        names = [spec.name for spec in self.manifest.tensors]
        if isinstance(value, Mapping):
            if set(value) != set(names):
                return None
            value = [value[name] for name in names]
        if not isinstance(value, list) or len(value) != len(names):
            return None
        arrays = [array.numpy() if hasattr(array, "numpy") else array for array in value]
        shapes = [getattr(array, "shape", None) for array in arrays]
        if shapes != [spec.shape for spec in self.manifest.tensors]:
            return None
        return {name: np.asarray(array, dtype=np.float32) for name, array in zip(names, arrays, strict=True)}

    def _read(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> TrainableState:
        state = TrainableState.from_arrays(
            {key: np.asarray(array, dtype=np.float32) for key, array in arrays.items()}, self.manifest
        )
        if not state.is_finite():
            raise RunError(f"aggregation.flower: {name} made a state with NaN or infinite values")
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


def _content(strategy: Any) -> dict[str, str]:
    """A digest of each of its attributes, to tell which of them changed."""
    return {key: hashlib.sha256(_told(value)).hexdigest() for key, value in vars(strategy).items()}


def _told(value: Any) -> bytes:
    """A value's content, so far as it can be told: arrays, what holds others, and what says of itself what it is."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return repr((value.shape, value.dtype.str)).encode() + value.tobytes()
    if isinstance(value, Mapping):
        return b"{" + b",".join(_told(key) + b":" + _told(one) for key, one in value.items()) + b"}"
    if isinstance(value, list | tuple | set | frozenset):
        return b"[" + b",".join(map(_told, value)) + b"]"
    return repr(value).encode()


def _asked_of_sites(order: Message) -> Iterable[str]:
    """The settings that an order of a strategy's has for its sites, besides the round's number."""
    return [key for record in order.content.config_records.values() for key in record if key != "server-round"]


def _record(state: TrainableState) -> ArrayRecord:
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(view.copy()) for name, view in state.tensors()})


def _reply(node: int, state: TrainableState, weight: float) -> Message:
    """An update as a strategy of Flower's gets it."""
    from flwr.app import Message, MetricRecord, RecordDict

    content = RecordDict({_ARRAYS: _record(state), _METRICS: MetricRecord({_WEIGHT: weight})})
    return Message(content, dst_node_id=node, message_type=MESSAGE_TYPE)
