"""Settings: one frozen record, read from the environment under one prefix, checked all at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit, urlunsplit

import msgspec
from msgspec import Meta

from orderbus._core.naming import nearest
from orderbus._core.signing import masked_keys, signing_keys
from orderbus.errors import SettingsError

PREFIX = "ORDERBUS_"
LOG_LEVEL = "ORDERBUS_LOG_LEVEL"
"""Read by programs that set up logging (`orderbus run`), not by a bus."""

BROKER_SCHEMES = ("amqp", "amqps", "memory")
MANAGEMENT_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("postgresql", "postgres", "embedded", "memory")
REDIS_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Everything a bus can be told from outside. Each field is `ORDERBUS_` + its name in upper case in the environment.

    What is given in code wins over the environment, also where it is the default: `Settings(relay=True)` relays under
    ORDERBUS_RELAY=false. URLs hold secrets: printing a Settings masks them.
    """

    broker_url: str | None = None
    """`amqp://user:password@host:5672/vhost`, `amqps://…`, or `memory://` (`memory://NAME`: shared in the process). Required."""
    management_url: str | None = None
    """`http[s]://user:password@host:15672`: RabbitMQ's management API, read by the command line; no bus needs it."""
    database_url: str | None = None
    """`postgresql://…`, `embedded` (a real PostgreSQL from a wheel), or `memory://` (inbox and outbox without SQL)."""
    redis_url: str | None = None
    """`redis://…`: guards handlers that write to no database (`guard="claims"`)."""
    redis_prefix: str = "ob:"
    """What the claims' keys begin with, where several programs share one Redis."""
    grace_s: Annotated[float, Meta(gt=0, le=3600)] = 20.0
    """How long a drain waits for started work, in seconds."""
    max_body_bytes: Annotated[int, Meta(ge=1024, le=16_777_216)] = 1_048_576
    """The largest body that is sent or decoded, in bytes."""
    dedupe_window_s: Annotated[float, Meta(ge=3600, le=366 * 86_400)] = 7 * 86_400.0
    """How long the inbox remembers an event, in seconds; an older event is parked, not guessed at."""
    pool_size: Annotated[int, Meta(ge=1, le=200)] = 8
    """Database connections of one bus."""
    relay: bool | None = None
    """Whether this process also relays the outbox; yes unless set. Several relays share the buckets among themselves."""
    relay_batch: Annotated[int, Meta(ge=1, le=5000)] = 1000
    """Rows that the relay reads, publishes and deletes at a time."""
    relay_lease_s: Annotated[float, Meta(ge=1, le=300)] = 3.0
    """How long a relay owns its buckets without renewing, in seconds."""
    signing_keys: str | None = None
    """`ID:BASE64,…`: signs what is emitted with the first key, and parks what none of them has signed."""

    def __new__(cls, **given: object) -> Settings:
        """Remembers which fields were given: no value could tell a given default from one left out (a Struct can't define this)."""
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    @classmethod
    def load(cls, environment: Mapping[str, str], given: Settings | None = None) -> Settings:
        """Read and check. Raises SettingsError that lists every mistake: unknown names (with the likely one), wrong values."""
        mistakes: list[str] = []
        names = tuple(field.name for field in fields(cls))
        values: dict[str, Any] = {}
        for name, text in environment.items():
            if not name.startswith(PREFIX) or name.startswith(f"{PREFIX}TEST_") or name == LOG_LEVEL:
                continue
            field = name[len(PREFIX) :].lower()
            if field not in names:
                mistakes.append(f"{name}: there is no such setting{_did_you_mean(field, names)}")
            elif text.strip():
                values[field] = text.strip()
        values |= {} if given is None else {name: getattr(given, name) for name in given.__dict__["_given"]}
        types = _types()
        checked: dict[str, Any] = {}
        for name, value in values.items():
            try:
                checked[name] = msgspec.convert(value, types[name], strict=False)
            except msgspec.ValidationError as error:
                mistakes.append(f"{PREFIX}{name.upper()}={_shown(name, value)}: {error}")
        settings = cls(**checked)
        mistakes += settings._url_mistakes()
        try:
            signing_keys(settings.signing_keys)
        except ValueError as error:
            mistakes.append(f"{PREFIX}SIGNING_KEYS: {error}")
        if mistakes:
            raise SettingsError(mistakes)
        return settings

    def _url_mistakes(self) -> list[str]:
        mistakes = []
        if self.broker_url is None:
            mistakes.append(
                "ORDERBUS_BROKER_URL: is required; for RabbitMQ amqp://user:password@host:5672/vhost, "
                "to try things out without a server memory://"
            )
        for name, url, schemes in (
            ("BROKER_URL", self.broker_url, BROKER_SCHEMES),
            ("MANAGEMENT_URL", self.management_url, MANAGEMENT_SCHEMES),
            ("DATABASE_URL", self.database_url, DATABASE_SCHEMES),
            ("REDIS_URL", self.redis_url, REDIS_SCHEMES),
        ):
            if url is None:
                continue
            try:
                scheme = url if url == "embedded" else urlsplit(url).scheme
            except ValueError:  # whose text may quote the password
                mistakes.append(
                    f"{PREFIX}{name}: can't be read as a URL; in a password write [ ] @ : / ? # percent-encoded (%5B for [)"
                )
                continue
            if scheme not in schemes:
                mistakes.append(f"{PREFIX}{name}={masked(url)}: must begin with one of {', '.join(s + '://' for s in schemes)}")
            elif scheme in MANAGEMENT_SCHEMES and not _names_a_host(url):
                mistakes.append(f"{PREFIX}{name}={masked(url)}: names no host or a wrong port; write http://host:15672")
        return mistakes

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_shown(name, getattr(self, name))}" for name in (field.name for field in fields(self)))
        return f"Settings({shown})"


@functools.cache
def _types() -> Mapping[str, Any]:
    return get_type_hints(Settings, include_extras=True)


def masked(url: str) -> str:
    """A URL without its password, to print; of what is no URL nothing that could be one.

    A password with a bare `/`, `?` or `#` ends the host too early: the `@` that follows tells. libpq takes some of these.
    """
    try:
        parts = urlsplit(url)
        if "://" not in url and ("@" in url or "=" in url):
            return "***"
        if "@" in parts.path + parts.query + parts.fragment:
            return f"{parts.scheme}://***"
        if parts.password is None and "password=" not in parts.query:
            return url
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, f"{parts.username or ''}:***@{host}", parts.path, "", ""))
    except ValueError:
        return "***"


def _names_a_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def _shown(name: str, value: object) -> str:
    if name == "signing_keys" and value is not None:
        return repr(masked_keys(value) if isinstance(value, str) else "***")
    return repr(masked(value) if name.endswith("_url") and isinstance(value, str) else value)


def _did_you_mean(field: str, known: tuple[str, ...]) -> str:
    near = nearest(field, known)
    return f"; did you mean {PREFIX}{near.upper()}?" if near else f"; there are {', '.join(PREFIX + k.upper() for k in known)}"
