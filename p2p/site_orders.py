"""A node's orders to its own site's trainer, with every answer checked. A site that cannot do it is a RunError."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from core_training import __version__
from core_training.foundation.errors import ProtocolError, RunError
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import EvalReport
from p2p.plan import RunPlan
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    EvaluateReply,
    InitialStateOrder,
    InitialStateReply,
    JoinOrder,
    JoinReply,
    Message,
    TrainOrder,
    Update,
)

Ask = Callable[[Envelope], Awaitable[Envelope]]
"""The site's trainer: takes an order, returns its reply."""

_Reply = TypeVar("_Reply", bound=Message)


class SiteOrders:
    """The orders of one run to one site."""

    def __init__(self, plan: RunPlan, ask: Ask) -> None:
        self._plan = plan
        self._ask = ask

    async def join(self) -> JoinReply:
        """Let the site build its engine; it says what it would train."""
        order = JoinOrder(
            run_id=self._plan.run_id, version=__version__, recipe=self._plan.recipe.to_yaml(), payload=b""
        )
        joined = await self._put(order, JoinReply, "could not join the run")
        if joined.run_id != self._plan.run_id or joined.recipe_digest != self._plan.recipe.engine_digest:
            raise RunError(f"site '{self._plan.name}' answered for another run or recipe")
        return joined

    async def initial_state(self, joined: JoinReply) -> TrainableState:
        """The state that the run begins with, the same at all sites."""
        order = InitialStateOrder(run_id=self._plan.run_id)
        failure = "could not send its initial state"
        reply = await self._put(order, InitialStateReply, failure)
        try:
            state = TrainableState.from_bytes(reply.payload, joined.parsed_manifest)
        except ProtocolError as error:
            raise RunError(f"site '{self._plan.name}' {failure}: {error}") from None
        if state.digest != joined.initial_state_digest:
            raise RunError(f"site '{self._plan.name}' {failure}: it sent another than it joined with")
        return state

    async def train(
        self, number: int, state: TrainableState | None, manifest_digest: str, void_rounds: int = 0
    ) -> Update:
        """One slice of training from `state`; without one, from the site's initial state.

        `void_rounds` of those before it changed nothing.
        """
        topology = self._plan.recipe.topology
        order = TrainOrder(
            run_id=self._plan.run_id,
            round=number,
            steps=topology.most_local_steps,
            evaluate=(number - 1) % topology.eval_every == 0,
            manifest_digest=manifest_digest,
            void_rounds=void_rounds,
            payload=state.to_bytes() if state else b"",
        )
        update = await self._put(order, Update, f"could not train round {number}")
        if (update.run_id, update.round) != (self._plan.run_id, number):
            raise RunError(f"site '{self._plan.name}' answered for round {update.round} of run '{update.run_id}'")
        if not update.weight > 0:
            raise RunError(f"site '{self._plan.name}' learned from no tokens in round {number}: has it any data?")
        return update

    async def evaluate(self, state: TrainableState, number: int, *, final: bool) -> EvalReport:
        """Evaluate the state at the end of a round; the site keeps the run's final one."""
        order = EvaluateOrder(
            run_id=self._plan.run_id,
            round=number,
            final=final,
            manifest_digest=state.manifest.digest,
            payload=state.to_bytes(),
        )
        return (await self._put(order, EvaluateReply, "could not evaluate the final state")).evaluation

    async def _put(self, order: Message, reply: type[_Reply], failure: str) -> _Reply:
        try:
            return reply.open(await self._ask(order.envelope()))
        except ProtocolError as error:
            raise RunError(f"site '{self._plan.name}' {failure}: {error}") from None
