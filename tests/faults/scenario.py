"""The list of scenarios, and how one is run: its own part, the way to quiet, the count."""

from __future__ import annotations

import importlib
import pkgutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from tests.faults import scenarios
from tests.faults.ledger import count
from tests.faults.servers import Servers
from tests.faults.world import ROOT, World

BUILD = ROOT / "build" / "faults"
RATE = 600.0
"""Events a second."""

Part = Callable[[World], None]


class Scenario(msgspec.Struct, frozen=True):
    """`is_quick`: it is one of those that `make test` runs."""

    name: str
    part: Part
    is_quick: bool

    @property
    def group(self) -> str:
        return getattr(self.part, "func", self.part).__module__.rpartition(".")[2]


class Result(msgspec.Struct, kw_only=True):
    """One line of the table: the count, and how it came to it.

    `disordered` is None where nobody followed any order, `recovery_s` where nothing had to recover; `words` say what went wrong.
    """

    name: str
    seed: int
    passed: bool
    sent: int = 0
    lost: int = 0
    doubled: int = 0
    ghosts: int = 0
    disordered: int | None = None
    innocents_parked: int = 0
    misparked: int = 0
    recovery_s: float | None = None
    seconds: float = 0.0
    handled: Mapping[str, int] = {}
    parked: int = 0
    repeated: int = 0
    words: tuple[str, ...] = ()


_scenarios: dict[str, Scenario] = {}


def scenario(name: str, *, quick: bool = False) -> Callable[[Part], Part]:
    """Registers a function as a scenario. It begins the load and breaks something; quiet and the count come after it."""

    def register(part: Part) -> Part:
        if name in _scenarios:
            raise ValueError(f"two scenarios are named {name}")
        _scenarios[name] = Scenario(name, part, quick)
        return part

    return register


def all_scenarios() -> dict[str, Scenario]:
    """By their names, in the order of the modules of tests/faults/scenarios."""
    for module in pkgutil.iter_modules(scenarios.__path__):
        importlib.import_module(f"{scenarios.__name__}.{module.name}")
    return dict(_scenarios)


def run(one: Scenario, servers: Servers, seed: int, *, rate: float = RATE, folder: Path = BUILD) -> Result:
    """Never raises what the scenario raises: it is in the result's words."""
    began = time.monotonic()
    result = Result(name=one.name, seed=seed, passed=False)
    try:
        with World(servers, one.name, seed, folder / one.name, rate) as world:
            one.part(world)
            found = count(world.settle())
            for name in found.__struct_fields__:
                setattr(result, name, getattr(found, name))
            result.recovery_s = world.recovery_s
            result.passed = found.is_clean
    except Exception as error:
        result.words = (str(error) if isinstance(error, AssertionError) else traceback.format_exc(),)
    result.seconds = round(time.monotonic() - began, 1)
    return result
