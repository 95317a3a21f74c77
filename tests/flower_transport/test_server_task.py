"""The ServerApp's process and the bundle that its run was started with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import PullTaskInputResponse

from core_training.foundation.errors import RunError
from flower_transport import server_task


def test_a_task_with_another_bundle_is_not_carried_out() -> None:
    client: Any = SimpleNamespace(PullTaskInput=lambda _: PullTaskInputResponse(fab=Fab(content=b"another")))
    carried_out: list[object] = []
    with pytest.raises(RunError, match="another bundle"):
        server_task._run(lambda *given: carried_out.append(given), client, "token")  # type: ignore[arg-type]
    assert carried_out == []
