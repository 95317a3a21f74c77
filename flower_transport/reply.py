"""An answer to an order, as a grid hands it over: whole, or known to be lost or spoilt on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from core_training.foundation.errors import ProtocolError
from flower_transport.records import from_message
from strategies.messages import Envelope

if TYPE_CHECKING:
    import flwr.app


class Reply:
    """An answer that has arrived, to the message `order`, or what is wrong with it: a text."""

    def __init__(self, order: str, message: flwr.app.Message | str) -> None:
        self.order = order
        self._message = message

    @classmethod
    def of(cls, message: flwr.app.Message) -> Self:
        """The answer that a message of Flower's is."""
        return cls(message.metadata.reply_to_message_id, message)

    @classmethod
    def broken_off(cls, order: str) -> Self:
        """An answer of which a part was lost on its way."""
        return cls(order, "its answer broke off on the way: the site, or its connection, failed while sending")

    @classmethod
    def malformed(cls, order: str, reason: str) -> Self:
        """An answer that is none, or is more than one may be."""
        return cls(order, f"its answer was not read: {reason}")

    def envelope(self) -> Envelope:
        """Its content. Raises ProtocolError when it is malformed or broken off, or Flower reports a failure."""
        if isinstance(self._message, str):
            raise ProtocolError(self._message)
        return from_message(self._message)
