"""For the tests of those who use orderbus: their buses on servers in memory, in virtual time. docs/testing.md is its page.

`orderbus.testing.sim` is the simulator, which lets a seed decide what fails.
"""

from orderbus._core.parked import Parked
from orderbus.testing.clock import DeadlockError, VirtualTimeLoop, virtual_backend, virtual_backends
from orderbus.testing.faults import FaultName
from orderbus.testing.record import Cost, Try
from orderbus.testing.testbus import StuckError, TestBus

__all__ = [
    "Cost",
    "DeadlockError",
    "FaultName",
    "Parked",
    "StuckError",
    "TestBus",
    "Try",
    "VirtualTimeLoop",
    "virtual_backend",
    "virtual_backends",
]
