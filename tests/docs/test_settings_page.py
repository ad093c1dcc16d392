"""docs/settings.md and .env.example list what can be set: every setting, its default and its bounds, and nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from orderbus import Settings
from orderbus._core.settings import LOG_LEVEL
from orderbus.cli.run import run
from orderbus.logs import LEVELS
from services.aggregator import Deadline
from services.notification import Notify
from services.orders_api.http import Limits
from services.payment import Rules
from services.shared.database import Stock
from tests.programs import ROOT

SERVICES: dict[str, type[msgspec.Struct]] = {
    "ORDERS_API_": Limits,
    "PAYMENT_": Rules,
    "ORDER_": Deadline,
    "NOTIFY_": Notify,
    "STOCK_": Stock,
}
READ_BY_HAND: dict[str, Any] = {
    LOG_LEVEL: inspect.signature(run).parameters["log_level"].default,
    "ORDERS_API_HOST": "127.0.0.1",
    "ORDERS_API_PORT": 8000,
}
ADDRESSES = ("ORDERBUS_BROKER_URL", "ORDERBUS_DATABASE_URL", "ORDERBUS_REDIS_URL")
"""Have no default: .env.example gives them servers of this machine."""


def settings() -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of everything that can be set."""
    hints = get_type_hints(Settings, include_extras=True)
    for field in dataclasses.fields(Settings):
        yield f"ORDERBUS_{field.name.upper()}", hints[field.name], field.default
    for name, default in READ_BY_HAND.items():
        yield name, type(default), default
    for prefix, struct in SERVICES.items():
        for member in msgspec.structs.fields(struct):
            yield prefix + member.name.upper(), member.type, member.default


SETTINGS = {name: (kind, default) for name, kind, default in settings()}


def page() -> Mapping[str, tuple[str, str]]:
    """Default and bounds of each setting of ours, as the page's tables say them; OpenTelemetry's are not ours."""
    rows = re.findall(r"^\| `(?!OTEL_)([A-Z_]+)` \| (.*?) \| (.*?) \|", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (default.strip("`"), allowed) for name, default, allowed in rows}


def env_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_page_lists_every_setting_in_order_and_no_other() -> None:
    assert list(page()) == list(SETTINGS)


def test_env_example_lists_every_setting_in_order_and_no_other() -> None:
    assert list(env_example()) == list(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_default_is_the_one_in_the_code(name: str) -> None:
    kind, default = SETTINGS[name]
    said, example = page()[name][0], env_example()[name]

    if default is None:
        assert said == "none"
        assert example == "" or name in ADDRESSES
    else:
        assert msgspec.convert(said, kind, strict=False) == default
        assert msgspec.convert(example, kind, strict=False) == default


@pytest.mark.parametrize("name", SETTINGS)
def test_the_bounds_are_those_in_the_code(name: str) -> None:
    allowed = page()[name][1]

    for meta in get_args(SETTINGS[name][0])[1:]:
        for bound in (meta.ge, meta.gt, meta.le, meta.lt) if isinstance(meta, msgspec.Meta) else ():
            assert bound is None or re.search(rf"\b{bound}\b", allowed), f"{name}: {bound} is not in {allowed!r}"


def test_the_levels_are_those_in_the_code() -> None:
    assert page()[LOG_LEVEL][1] == ", ".join(f"`{level}`" for level in LEVELS)


def test_env_example_is_accepted_as_it_is() -> None:
    loaded = Settings.load({name: text for name, text in env_example().items() if name.startswith("ORDERBUS_")})

    assert loaded.relay is None
    assert loaded.dedupe_window_s == 7 * 86_400
