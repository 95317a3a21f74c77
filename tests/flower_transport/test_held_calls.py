"""Calls that are held until there is something to answer: when they are answered, and when nobody is there any more."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from flower_transport.bells import Bells
from flower_transport.held_calls import HeldCalls
from flower_transport.waiting import MOST_SECONDS, PrefersToWait


class Call:
    """One call through the middleware, of somebody who listens for `keys`."""

    def __init__(self, bells: Bells, wait: str | None = "5", *, path: str = "/held", may_wait: bool = True) -> None:
        self.answered_after: float | None = None
        self.leaves = asyncio.Event()
        headers = [] if wait is None else [(b"prefer", f"wait={wait}".encode())]
        self.scope = {"type": "http", "path": path, "headers": headers}
        self._sent_body = False
        self._app = HeldCalls(self._answer, bells, {"/held": self._keys}, lambda scope: may_wait)

    @staticmethod
    def _keys(body: bytes) -> list[str]:
        if body != b"body":
            raise DecodeError("no message")
        return ["ours", "theirs"]

    async def run(self, body: bytes = b"body") -> Call:
        self.body, began = body, time.monotonic()
        await asyncio.wait_for(self._app(self.scope, self._receive, self._nothing), 10)
        if self.answered_after is not None:
            self.answered_after -= began
        return self

    async def _receive(self) -> dict[str, Any]:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == self.body, "who answers does not see the body"
        self.answered_after = time.monotonic()

    async def _nothing(self, _: Any) -> None:
        raise AssertionError("nothing is refused")


def test_a_call_is_held_until_a_bell_rings_for_it_from_whatever_thread() -> None:
    async def scene() -> Call:
        bells = Bells()
        asyncio.get_running_loop().call_later(0.1, bells.ring, "others")
        ringing = asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(0.3), bells.ring("theirs")))
        call = await Call(bells).run()
        await ringing
        return call

    answered = asyncio.run(scene()).answered_after
    assert answered is not None
    assert 0.25 < answered < 2


@pytest.mark.parametrize("wait", [None, "0", "x", "-3", "1234", "٣"])
def test_a_call_that_asks_for_no_waiting_is_answered_at_once(wait: str | None) -> None:
    answered = asyncio.run(Call(Bells(), wait).run()).answered_after
    assert answered is not None
    assert answered < 0.5


@pytest.mark.parametrize("told", [{"path": "/other"}, {"may_wait": False}])
def test_other_calls_and_those_who_may_not_wait_are_answered_at_once(told: dict[str, Any]) -> None:
    answered = asyncio.run(Call(Bells(), **told).run()).answered_after
    assert answered is not None
    assert answered < 0.5


def test_a_bell_goes_on_until_it_is_silenced() -> None:
    async def scene() -> tuple[Call, Call]:
        bells = Bells()
        bells.ring("ours")
        first = await Call(bells).run()
        bells.silence(["ours", "never rung"])
        return first, await Call(bells, "1").run()

    first, second = asyncio.run(scene())
    assert first.answered_after is not None
    assert first.answered_after < 0.5
    assert second.answered_after is not None
    assert second.answered_after > 0.9


def test_who_leaves_is_not_answered_so_that_what_it_would_be_told_is_there_for_the_next() -> None:
    async def scene() -> Call:
        call = Call(Bells())
        asyncio.get_running_loop().call_later(0.2, call.leaves.set)
        return await call.run()

    assert asyncio.run(scene()).answered_after is None


def test_a_server_that_ends_holds_nobody() -> None:
    async def scene() -> tuple[Call, Call]:
        bells = Bells()
        asyncio.get_running_loop().call_later(0.2, bells.let_go)
        return await Call(bells).run(), await Call(bells).run()

    for call in asyncio.run(scene()):
        assert call.answered_after is not None
        assert call.answered_after < 2


def test_a_body_that_is_none_is_left_to_whoever_answers() -> None:
    answered = asyncio.run(Call(Bells()).run(b"\xff")).answered_after
    assert answered is not None
    assert answered < 0.5


def test_nobody_who_has_left_is_kept() -> None:
    async def scene() -> Bells:
        bells = Bells()
        await asyncio.gather(*(Call(bells, "1").run() for _ in range(20)))
        return bells

    assert asyncio.run(scene())._listeners == {}


@pytest.mark.parametrize(
    ("method", "seconds", "said"),
    [("Pull", 20.0, "wait=20"), ("Pull", 0.4, "wait=1"), ("Pull", 0, None), ("X", 9, None)],
)
def test_a_client_says_how_long_it_would_wait_and_no_longer_than_its_own_patience(
    method: str, seconds: float, said: str | None
) -> None:
    import httpx

    request = httpx.Request("POST", "https://server/")
    context: Any = type("Context", (), {"rpc_method": f"/flwr.proto.Fleet/{method}", "request": request})
    PrefersToWait("Pull", seconds).intercept(context, lambda _: httpx.Response(200))
    assert request.headers.get("prefer") == said
    assert MOST_SECONDS < 30, "Flower's clients wait for thirty seconds"
