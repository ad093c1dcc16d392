"""What buses send and receive, as an AsyncAPI 3.0 document for people and generators of other languages.

https://www.asyncapi.com/docs/reference/specification/v3.0.0 and the AMQP binding 0.3.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from orderbus._core.codec import CONTENT_TYPES
from orderbus._core.message import KEY, VERSION
from orderbus._core.topology import BUCKETS, EVENTS_EXCHANGE
from orderbus._runtime.bus import Bus
from orderbus.cli.graph import Flow, flows
from orderbus.errors import UsageError

BINDING = "0.3.0"
_BUCKET = f"Two digits, 00 to {BUCKETS - 1}: CRC-32 of the key (of the event's id where it has none), modulo {BUCKETS}."


def asyncapi(buses: Sequence[Bus]) -> dict[str, Any]:
    """The document. Raises UsageError where an event holds a type that JSON Schema can't say."""
    found = flows(buses)
    try:
        payloads, schemas = msgspec.json.schema_components(
            [flow.event for flow in found], ref_template="#/components/schemas/{name}"
        )
    except TypeError as error:
        raise UsageError(f"an event can't be described by JSON Schema: {error}", code="OB616") from error
    names = [payload["$ref"].rpartition("/")[2] for payload in payloads]
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for flow, name in zip(found, names, strict=True):
        messages[name] = _message(flow, name)
        channel = channels.setdefault(flow.kind.topic, _channel(flow.kind.topic))
        channel["messages"][name] = {"$ref": f"#/components/messages/{name}"}
        for bus in flow.senders:
            _add(operations, f"{bus.group}.send.{flow.kind.topic}", "send", bus.group, flow, name)
        for reader in flow.readers:
            for handler in reader.handlers:
                operation = _add(operations, f"{handler.consumer}.receive.{flow.kind.topic}", "receive", reader.group, flow, name)
                operation["summary"] = f"{handler.function.__qualname__}, from the queue {handler.queue}"
    return {
        "asyncapi": "3.0.0",
        "info": {"title": ", ".join(bus.group for bus in buses), "version": "unversioned"},
        "defaultContentType": CONTENT_TYPES["json"],
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": _draft_07(schemas)},
    }


def _channel(topic: str) -> dict[str, Any]:
    exchange = {"name": EVENTS_EXCHANGE, "type": "topic", "durable": True, "autoDelete": False}
    return {
        "address": f"{topic}.{{bucket}}",
        "parameters": {"bucket": {"description": _BUCKET}},
        "messages": {},
        "bindings": {"amqp": {"is": "routingKey", "exchange": exchange, "bindingVersion": BINDING}},
    }


def _message(flow: Flow, name: str) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    if flow.kind.key is not None:
        headers[KEY] = {"type": "string", "description": f"The event's {flow.kind.key}, by which events are ordered."}
    if flow.kind.version != 1:
        headers[VERSION] = {"type": "string", "const": str(flow.kind.version)}
    form = flow.senders[0]._format if flow.senders else "json"
    message = {
        "name": name,
        "title": f"{flow.event.__name__} v{flow.kind.version}",
        "contentType": CONTENT_TYPES[form],
        "payload": {"$ref": f"#/components/schemas/{name}"},
        "bindings": {"amqp": {"messageType": flow.kind.topic, "bindingVersion": BINDING}},
    }
    return message | ({"headers": {"type": "object", "properties": headers}} if headers else {})


def _add(operations: dict[str, Any], id_: str, action: str, group: str, flow: Flow, name: str) -> dict[str, Any]:
    channel = f"#/channels/{flow.kind.topic}"
    operation: dict[str, Any] = operations.setdefault(
        id_, {"action": action, "channel": {"$ref": channel}, "tags": [{"name": group}], "messages": []}
    )
    operation["messages"].append({"$ref": f"{channel}/messages/{name}"})
    return operation


def _draft_07(schema: Any) -> Any:
    """msgspec writes JSON Schema 2020-12, AsyncAPI reads draft 07, where a tuple's `items: false` would allow no item at all."""
    if isinstance(schema, list):
        return [_draft_07(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "prefixItems" in schema:
        schema = {**schema, "items": schema["prefixItems"], "additionalItems": schema.get("items", True)}
        del schema["prefixItems"]
    return {name: _draft_07(value) for name, value in schema.items()}
