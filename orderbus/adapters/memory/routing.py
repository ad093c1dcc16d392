"""Which queues a message reaches: exchanges, bindings, and the topic patterns of AMQP 0-9-1 (section 3.1.3)."""

from __future__ import annotations

from orderbus._core.topology import Binding, Exchange, Queue, Topology
from orderbus.errors import TopologyError, UsageError

__all__ = ["Router", "topic_matches"]


class Router:
    """What has been declared so far. Equal declarations pass; a different one changes nothing and raises TopologyError."""

    def __init__(self) -> None:
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, Queue] = {}
        self._bindings: dict[str, dict[tuple[str, str], None]] = {}

    def declare(self, topology: Topology) -> list[Queue]:
        """Take over what is missing, all or nothing; the queues that are new."""
        _refuse_differences(self.exchanges, self.queues, topology)
        exchanges = self.exchanges.keys() | {exchange.name for exchange in topology.exchanges}
        queues = self.queues.keys() | {queue.name for queue in topology.queues}
        for binding in topology.bindings:
            _refuse_dangling(binding, exchanges, queues)

        self.exchanges.update((exchange.name, exchange) for exchange in topology.exchanges)
        new = {queue.name: queue for queue in topology.queues if queue.name not in self.queues}
        self.queues.update(new)
        for binding in topology.bindings:
            self._bindings.setdefault(binding.exchange, {})[(binding.routing_key, binding.queue)] = None
        return list(new.values())

    def forget_queue(self, name: str) -> None:
        """Delete a queue and its bindings."""
        del self.queues[name]
        for exchange, bindings in self._bindings.items():
            self._bindings[exchange] = {pair: None for pair in bindings if pair[1] != name}

    def has(self, exchange: str) -> bool:
        """Whether one may publish to it: the default exchange, or one that was declared."""
        return exchange == "" or exchange in self.exchanges

    def route(self, exchange: str, routing_key: str) -> list[str]:
        """The names of the queues reached, each once, in the order of their bindings; none where nothing matches.

        Nor where there is no such exchange: the broker keeps nothing for one that it does not have.
        """
        if exchange == "":
            return [routing_key] if routing_key in self.queues else []
        tried: set[str] = set()
        name: str | None = exchange
        while name is not None and name in self.exchanges and name not in tried:
            tried.add(name)
            found = self._matching(self.exchanges[name], routing_key)
            if found:
                return found
            name = self.exchanges[name].alternate
        return []

    def _matching(self, exchange: Exchange, routing_key: str) -> list[str]:
        words = routing_key.split(".")
        found: dict[str, None] = {}
        for pattern, queue in self._bindings.get(exchange.name, ()):
            match exchange.kind:
                case "fanout":
                    matches = True
                case "direct":
                    matches = pattern == routing_key
                case "topic":
                    matches = topic_matches(pattern.split("."), words)
            if matches:
                found[queue] = None
        return list(found)


def topic_matches(pattern: list[str], words: list[str]) -> bool:
    """Whether a topic pattern matches: `*` stands for exactly one word, `#` for none or more.

    >>> topic_matches(["orders", "*", "07"], ["orders", "placed", "07"])
    True
    >>> topic_matches(["orders", "#"], ["orders"])
    True
    """
    # The prefixes of `words` that the pattern so far may have consumed: linear in the pattern, whatever the number of `#`.
    reached = {0}
    for part in pattern:
        if part == "#":
            reached = set(range(min(reached), len(words) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(words) and part in ("*", words[at])}
        if not reached:
            return False
    return len(words) in reached


def _refuse_differences(exchanges: dict[str, Exchange], queues: dict[str, Queue], topology: Topology) -> None:
    mistakes = []
    for kind, known, wanted in (("exchange", exchanges, topology.exchanges), ("queue", queues, topology.queues)):
        declared: dict[str, Exchange | Queue] = dict(known)
        for new in wanted:
            old = declared.setdefault(new.name, new)
            for argument in new.__struct_fields__:
                has, wants = getattr(old, argument), getattr(new, argument)
                if has != wants:
                    mistakes.append(f"{kind} {new.name!r} exists with {argument}={has!r}, but {wants!r} is wanted")
    if mistakes:
        raise TopologyError(
            "\n".join(mistakes) + "\nnothing was changed: declare what exists, or empty and delete it first and apply again"
        )


def _refuse_dangling(binding: Binding, exchanges: set[str], queues: set[str]) -> None:
    for kind, name, known in (("exchange", binding.exchange, exchanges), ("queue", binding.queue, queues)):
        if name not in known:
            raise UsageError(
                f"the binding {binding.exchange!r} -> {binding.queue!r} needs the {kind} {name!r}: declare it with the binding",
                code="OB506",
            )
