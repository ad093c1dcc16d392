"""What the tests of handlers share."""

from collections.abc import Callable

import pytest

from orderbus import Bus, Event, UsageError
from orderbus._core.handler import Plan


class Placed(Event, topic="orders.placed", key="order_id"):
    order_id: int


class Paid(Event, topic="payments.paid", key="order_id"):
    order_id: int


class Mailer:
    pass


def plan_of(bus: Bus) -> Plan:
    ((_, plan),) = bus.plans()
    return plan


def refused(register: Callable[[], object], code: str, *fragments: str) -> None:
    """With the code of its paragraph, and every fragment is in the text: what is wrong, where, and what to write instead."""
    with pytest.raises(UsageError) as raised:
        register()
    assert raised.value.code == code
    for fragment in fragments:
        assert fragment in str(raised.value)
