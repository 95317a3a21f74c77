"""What a SuperLink knows of its sites, runs and messages: in memory, but for the sites' numbers, which outlive it.

Flower offers a state in memory that forgets the sites, and a database that costs some three hundred statements for each
site and round. Of all that is kept there only the numbers of the sites are needed again by a SuperLink that was
restarted: the runs under way are then started anew (`server.superexec`).

A message is handed out once all its parts are there, and again when its receiver asks for one without having confirmed
the one before: the answer was lost on its way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.supercore.constant import NodeStatus
from flwr.supercore.date import now
from flwr.supercore.run import RunStatus
from flwr.superlink.federation import FederationManager
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from core_training.foundation.bounded_reading import ForeignTextError, read_json
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from flower_transport.bells import Bells
from flower_transport.message_parts import MessageParts

_log = logging.getLogger(__name__)

MOST_HANDED_OUT = 3
"""How often a message is handed out, in all, to a receiver that does not confirm it."""

_ON_ITS_WAY = "on its way"
"""Stands where Flower notes when a message was delivered: it hands out none where anything stands."""


class SuperLinkState(InMemoryLinkState):  # type: ignore[misc]
    """Flower's state in memory, which keeps the sites' numbers in a file, and rings when there is something to fetch.

    `bells` go by a node's number where a message for it is there, and by a message's id where its answer is.
    """

    def __init__(self, manager: FederationManager, parts: MessageParts, nodes: Path, bells: Bells) -> None:
        super().__init__(manager, parts)
        self._parts = parts
        self._lock_object_push_sessions = self.lock  # Flower takes the two in either order, which can block it for good
        self._file = nodes
        self._bells = bells
        self._handed_out: dict[str, int] = {}
        self._lost: set[str] = set()
        """The orders that nodes had in hand when they left: nobody will answer them."""
        self._from_before: set[int] = set()
        """The nodes that have not been heard of since this SuperLink started."""
        self._read_nodes()

    def create_node(self, *given: Any, **named: Any) -> int:
        with self.lock:
            node_id: int = super().create_node(*given, **named)
            self._keep_nodes()
            return node_id

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        with self.lock:
            node = self.nodes.get(node_id)
            is_first = node is not None and not node.last_activated_at
            activated: bool = super().activate_node(node_id, heartbeat_interval)
            self._from_before.discard(node_id)
            if activated and is_first:
                self._keep_nodes()
            return activated

    def deactivate_node(self, node_id: int) -> bool:
        """Note what the node had in hand as lost, and let whoever waits for its answers look at once."""
        with self.lock:
            deactivated: bool = super().deactivate_node(node_id)
            self._from_before.discard(node_id)
            for message in self._orders_to(node_id) if deactivated else ():
                number = message.metadata.message_id
                if self._handed_out.get(number) and number not in self._parts and self._reply_to(number) is None:
                    self._lost.add(number)
                self._bells.ring(number)
            return deactivated

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        with self.lock:
            self._from_before.discard(node_id)
            known: bool = super().acknowledge_node_heartbeat(node_id, heartbeat_interval)
            return known

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """The statuses of runs; one that is not known was an earlier SuperLink's, and has ended with it."""
        known: dict[int, RunStatus] = super().get_run_status(run_ids)
        ended = RunStatus(status=Status.FINISHED, sub_status=SubStatus.STOPPED, details="")
        return {run_id: known.get(run_id, ended) for run_id in run_ids}

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        with self.lock:
            if object_tree.object_id != message.metadata.message_id:
                return False, []
            stored, missing = super().store_message_and_object_tree(message, object_tree, session_id)
            if stored and missing:
                self._hold_back(object_tree.object_id)
            elif stored:
                self._announce(object_tree.object_id)
            return stored, missing

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Store a part. Says yes to one that is there: the answer to the same call may have been lost."""
        with self.lock:
            session = self._session_of(session_id, object_id)
            site = None if session is None else self._site_of(session)
        if session is None:
            return self._parts.is_there(object_id)
        try:
            settled = self._parts.settle(object_id, object_content, site)
        except (ValueError, OSError) as error:
            _log.error("part %s was not stored: %s", object_id, error)
            return False
        with self.lock:
            stored: bool = super().store_object(run_id, session_id, object_id, settled)
            if not stored:
                return self._parts.is_there(object_id)
            if not session.pending_object_ids:
                for whole in session.root_object_ids:
                    self._announce(whole)
            return True

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        # One that is there is read with no lock held.
        found: bytes | None = self._parts.get(object_id) or super().get_object(run_id, object_id)
        return found

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        with self.lock:
            if node_id in self._from_before:  # it went on asking while this SuperLink was being restarted
                self.acknowledge_node_heartbeat(node_id, HEARTBEAT_DEFAULT_INTERVAL)
            for message in self._unconfirmed(node_id):
                message.metadata.delivered_at = ""
            messages: list[Message] = super().get_message_ins(node_id, limit, run_id=run_id)
            for message in messages:
                number = message.metadata.message_id
                self._handed_out[number] = self._handed_out.get(number, 0) + 1
            if not any(message.metadata.delivered_at == "" for message in self._orders_to(node_id)):
                self._bells.silence([node_id])
            return messages

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """The answers that are there to these messages. Those that are no longer known, as too old, have none."""
        with self.lock:
            self._check_stored_messages(message_ids, run_id)
            known = {number for number in message_ids if number in self.message_ins_store}
            # What is there counts, though its site may have gone since: Flower would first look for that.
            messages = [self._deliver(reply) for number in known if (reply := self._reply_to(number)) is not None]
            open_ones = known - {reply.metadata.reply_to_message_id for reply in messages}
            messages += [self._unavailable(number) for number in open_ones & self._lost]
            if open_ones := open_ones - self._lost:
                messages += super().get_message_res(open_ones, run_id)
            self._bells.silence(message_ids)
            return messages

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """Forget messages and their replies, and the parts of those that nobody fetches any more."""
        with self.lock:
            for number in message_ins_ids:
                self._parts.delete(number)
                reply = self.message_ins_id_to_message_res_id.get(number)
                if reply is not None and self.message_res_store[reply].metadata.delivered_at in ("", _ON_ITS_WAY):
                    self._cleanup_push_session(self._object_push_session_by_root.get(reply, ""), cleanup_messages=False)
                    self._parts.delete(reply)
                self._handed_out.pop(number, None)
            self._lost -= message_ins_ids
            super().delete_messages(message_ins_ids)
            self._bells.silence(message_ins_ids)

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """End a task; with that of a run, whatever is left of its messages goes."""
        finished: bool = super().finish_task(task_id, sub_status, details)
        task = self.task_store.get(task_id)
        if finished and task is not None and self._is_primary_task(task_id):
            self.cleanup_run(task.run_id)
        return finished

    def _session_of(self, session_id: str, object_id: str) -> Any:
        """The session in which a part is awaited; None where it is in none."""
        session = self._object_push_sessions.get(session_id)
        return session if session is not None and object_id in session.pending_object_ids else None

    def _site_of(self, session: Any) -> int | None:
        """The number of the site whose answers a session brings; None where it brings the ServerApp's orders."""
        replies = (self.message_res_store.get(root) for root in session.root_object_ids)
        return next((reply.metadata.src_node_id for reply in replies if reply is not None), None)

    def _reply_to(self, number: str) -> Message | None:
        """The reply to an order, where all of it is there and nobody has it yet."""
        reply = self.message_res_store.get(self.message_ins_id_to_message_res_id.get(number, ""))
        return reply if reply is not None and reply.metadata.delivered_at == "" else None

    @staticmethod
    def _deliver(reply: Message) -> Message:
        reply.metadata.delivered_at = now().isoformat()
        return reply

    def _unavailable(self, number: str) -> Message:
        """An answer in the name of a node that left with the order in hand."""
        made = create_message_error_unavailable_res_message(self.message_ins_store[number].metadata, "node_unavail")
        self._store_generated_message(made)
        return made

    def _hold_back(self, number: str) -> None:
        kept = self.message_ins_store.get(number) or self.message_res_store.get(number)
        if kept is not None and kept.metadata.delivered_at == "":
            kept.metadata.delivered_at = _ON_ITS_WAY

    def _announce(self, number: str) -> None:
        """Let a message be fetched, all of which is there now."""
        kept = self.message_ins_store.get(number) or self.message_res_store.get(number)
        if kept is None:
            return
        if kept.metadata.delivered_at == _ON_ITS_WAY:
            kept.metadata.delivered_at = ""
        if kept.metadata.delivered_at == "":
            self._bells.ring(kept.metadata.reply_to_message_id or kept.metadata.dst_node_id)

    def _orders_to(self, node_id: int) -> list[Message]:
        return [message for message in self.message_ins_store.values() if message.metadata.dst_node_id == node_id]

    def _unconfirmed(self, node_id: int) -> Iterable[Message]:
        """The messages that a node was handed, and does not have: its SuperNode has one at a time in hand."""
        for message in self._orders_to(node_id):
            number = message.metadata.message_id
            # What is confirmed is in the store of parts no longer.
            if 0 < self._handed_out.get(number, 0) < MOST_HANDED_OUT and number in self._parts:
                yield message

    def _keep_nodes(self) -> None:
        kept = [MessageToDict(node) for node in self.nodes.values()]
        commit_file(self._file, json.dumps(kept, indent=1).encode())

    def _read_nodes(self) -> None:
        try:
            kept = [ParseDict(node, NodeInfo()) for node in read_json(self._file)]
        except FileNotFoundError:
            return
        except (OSError, ForeignTextError, ParseError, TypeError) as error:
            raise InputError(f"{self._file}: this is no list of a SuperLink's nodes: {error}") from None
        for node in kept:
            node.online_until = 0.0
            if node.status == NodeStatus.ONLINE:
                node.status = NodeStatus.OFFLINE
            self.nodes[node.node_id] = node
            self.node_public_key_to_node_id[node.public_key] = node.node_id
            self.owner_to_node_ids.setdefault(node.owner_aid, set()).add(node.node_id)
            self._from_before.add(node.node_id)
