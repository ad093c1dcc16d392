"""Asking the broker for something, and hearing what it says in refusing."""

from __future__ import annotations

from typing import Any

from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelClosed, ChannelLockedResource, ChannelPreconditionFailed

from orderbus.adapters.rabbitmq.connection import Connection, describe
from orderbus.adapters.rabbitmq.topology import Call, ignore
from orderbus.errors import TopologyError, UnavailableError


class Asking:
    """Calls on a channel of its own, which the broker closes over each refusal."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._channel: AbstractChannel | None = None

    async def ask(self, call: Call) -> str | None:
        """None, or what the broker said in refusing."""
        try:
            await self.call(call)
        except TopologyError as refusal:
            return refusal.text
        return None

    async def call(self, call: Call) -> Any:
        """The broker's answer. Raises TopologyError with its words where it refuses."""
        if self._channel is None:
            self._channel = await self._connection.open_plain_channel()
        try:
            return await self._connection.call(call(self._channel), "asking the broker", on_giving_up=ignore)
        except ChannelClosed as failure:
            self._channel = None
            said = " ".join(str(argument) for argument in failure.args)
            if isinstance(failure, _REFUSALS) or "NOT_FOUND" in said:
                raise TopologyError(said) from failure
            raise UnavailableError(f"{self._connection.address.shown}: {describe(failure)}") from failure


_REFUSALS = (ChannelPreconditionFailed, ChannelLockedResource, ChannelAccessRefused)
