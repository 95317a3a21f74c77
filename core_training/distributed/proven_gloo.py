"""gloo between processes that have proven to each other that they are of one group.

gloo asks nobody who they are: whoever connects first, from whatever account of the machine, is taken for the process
that was waited for, and is sent what is meant for that one. Here nothing is sent over a connection before both of its
ends have shown what they can know from the group's store alone, which lies in a private folder.
"""

from __future__ import annotations

import hmac
import secrets
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Backend, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from core_training.foundation.errors import RunError

NAME = "proven_gloo"
_PROVEN_WITHIN = timedelta(seconds=60)
_TOKEN_BYTES = 32


def _create(options: Any, _: object) -> ProcessGroupGloo:
    """torch's creator of a process group: its own of gloo, proven. Raises RunError when a process is not the one."""
    group = ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)
    _prove(group, options.store, options.group_rank, options.group_size)
    group._set_sequence_number_for_group()
    return group


def _prove(group: Any, store: Store, rank: int, size: int) -> None:
    """Send each other process a token drawn for it, and hold what came from it against what it left in the store."""
    others = [other for other in range(size) if other != rank]
    tokens = {other: secrets.token_bytes(_TOKEN_BYTES) for other in others}
    for other, token in tokens.items():
        store.set(_key(rank, other), token.hex())
    received = {other: torch.zeros(_TOKEN_BYTES, dtype=torch.uint8) for other in others}
    try:
        exchanged = [group.recv([received[other]], other, 0) for other in others]
        exchanged += [
            group.send([torch.frombuffer(bytearray(tokens[other]), dtype=torch.uint8)], other, 0) for other in others
        ]
        for work in exchanged:
            work.wait(_PROVEN_WITHIN)
    except RuntimeError as error:
        raise _not_proven(rank) from error
    for other in others:
        if not hmac.compare_digest(
            received[other].numpy().tobytes(), bytes.fromhex(store.get(_key(other, rank)).decode())
        ):
            raise _not_proven(rank)


def _key(sender: int, receiver: int) -> str:
    return f"token/{sender}/{receiver}"


def _not_proven(rank: int) -> RunError:
    return RunError(
        f"process {rank} of the DeepSpeed group was connected to by something that is not of the group (another "
        "account of this machine), or one of the group hangs; nothing was sent to it. Start the command again"
    )


Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
