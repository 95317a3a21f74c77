"""The peer in secure aggregation: Flower's SecAgg+, its client mod at every site and its workflow at the server.

One round in this process, with the package that is installed. Timed are the mod's stage that quantises and masks, and
the workflow's unmasking, neither with what it waits for: the training there, and the sites' answers here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.error import Error
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, parameters_to_arrayrecord
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity

Arrays = list[npt.NDArray[Any]]

CLIP = 8.0
"""The mod's own default: values are cut to ± this."""

_NOTHING = Parameters([], "numpy.ndarray")


@dataclass
class PeerRound:
    """Seconds of each site's masking and of the server's unmasking, the bytes each site sent, and the sites' mean."""

    masking_seconds: list[float] = field(default_factory=list)
    unmasking_seconds: float = 0.0
    bytes_up: dict[int, int] = field(default_factory=dict)
    mean: Arrays = field(default_factory=list)


def peer_round(
    update: Callable[[int], Arrays], sites: int, dropped: int, threshold: int, after_masking: Callable[[], None]
) -> PeerRound:
    """One round of equal weights over the complete graph; the last `dropped` sites leave before they mask.

    `update(n)` is that of site n, from 1. `after_masking()` follows each site's masking: the other side takes its turn.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    round_ = PeerRound()
    grid = _Sites(update, sites, sites - dropped, after_masking, round_)
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=_Strategy(sites, grid, round_))
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(_NOTHING, True)
    SecAggPlusWorkflow(num_shares=sites, reconstruction_threshold=threshold, clipping_range=CLIP)(grid, context)
    return round_


class _Sites:
    """All sites, behind the one method of Flower's Grid that the workflow calls."""

    def __init__(
        self,
        update: Callable[[int], Arrays],
        sites: int,
        staying: int,
        after_masking: Callable[[], None],
        round_: PeerRound,
    ) -> None:
        self._update = update
        self._staying = staying
        self._after_masking = after_masking
        self._round = round_
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, sites + 1)}
        self.answered = 0.0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = [self._answer(copy.deepcopy(message)) for message in messages]
        self.answered = time.perf_counter()
        return replies

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        masking = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE] == Stage.COLLECT_MASKED_VECTORS
        if masking and node > self._staying:
            return Message(Error(0, "left"), reply_to=message)
        trained = self._trained(node) if masking else RecordDict()
        began = time.perf_counter()
        reply = secaggplus_mod(message, self._contexts[node], lambda asked, _: Message(trained, reply_to=asked))
        seconds = time.perf_counter() - began
        sent = len(reply.content.config_records[RECORD_KEY_CONFIGS].deflate())
        self._round.bytes_up[node] = self._round.bytes_up.get(node, 0) + sent
        if masking:
            self._round.masking_seconds.append(seconds)
            self._after_masking()
        return reply

    def _trained(self, node: int) -> RecordDict:
        parameters = ndarrays_to_parameters(self._update(node))
        return fitres_to_recorddict(FitRes(Status(Code.OK, ""), parameters, num_examples=1000, metrics={}), False)


class _Strategy(FedAvg):  # type: ignore[misc]
    """Asks all sites, and takes from the workflow what has been unmasked, which ends the time of that."""

    def __init__(self, sites: int, grid: _Sites, round_: PeerRound) -> None:
        super().__init__()
        self._proxies = [SimpleNamespace(node_id=node) for node in range(1, sites + 1)]
        self._grid = grid
        self._round = round_

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[Any]:
        return [(proxy, FitIns(_NOTHING, {})) for proxy in self._proxies]

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        self._round.unmasking_seconds = time.perf_counter() - self._grid.answered
        self._round.mean = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}
