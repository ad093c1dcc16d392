"""RabbitMQ: control by aiormq, data by ourselves.

`connection.py` holds both planes together; `transport.py` splits the bytes between them; `frames.py`, `fields.py`, `content.py`,
`confirms.py`, `settlements.py` and `encoder.py` are pure functions and state machines over bytes.
"""

from orderbus.adapters.rabbitmq.broker import RabbitBroker, open_broker

__all__ = ["RabbitBroker", "open_broker"]
