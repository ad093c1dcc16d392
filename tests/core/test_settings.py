"""Where a bus's settings come from: the environment, and before it what the program says."""

from __future__ import annotations

import copy
import pickle

import pytest

from orderbus import Settings, SettingsError
from orderbus._core.settings import masked

BROKER = {"ORDERBUS_BROKER_URL": "memory://"}


def test_the_environment_is_read_by_its_prefix_and_converted() -> None:
    settings = Settings.load({**BROKER, "ORDERBUS_POOL_SIZE": " 3 ", "ORDERBUS_RELAY": "false", "POOL_SIZE": "9"})

    assert (settings.broker_url, settings.pool_size, settings.relay) == ("memory://", 3, False)


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert Settings.load({**BROKER, "ORDERBUS_GRACE_S": ""}).grace_s == Settings().grace_s


def test_what_is_given_in_code_wins_over_the_environment() -> None:
    settings = Settings.load({**BROKER, "ORDERBUS_GRACE_S": "7", "ORDERBUS_POOL_SIZE": "3"}, Settings(grace_s=2.0))

    assert (settings.grace_s, settings.pool_size) == (2.0, 3)


def test_a_default_that_is_given_in_code_wins_too() -> None:
    environment = {**BROKER, "ORDERBUS_RELAY": "false", "ORDERBUS_REDIS_URL": "redis://127.0.0.1/"}

    assert Settings.load(environment, Settings(relay=True)).relay
    assert Settings.load(environment, Settings(redis_url=None)).redis_url is None
    assert not Settings.load(environment, Settings()).relay


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda settings: pickle.loads(pickle.dumps(settings))])
def test_a_copy_remembers_what_was_given(duplicate: object) -> None:
    assert callable(duplicate)
    given = duplicate(Settings(relay=True))

    assert given == Settings(relay=True)
    assert Settings.load({**BROKER, "ORDERBUS_RELAY": "false"}, given).relay


def test_every_mistake_is_told_at_once_and_no_secret_is() -> None:
    environment = {
        "ORDERBUS_RELY": "true",
        "ORDERBUS_POOL_SIZE": "none",
        "ORDERBUS_BROKER_URL": "ftp://user:s3cret@host/",
    }

    with pytest.raises(SettingsError) as raised:
        Settings.load(environment, Settings(grace_s=-1.0))

    text = str(raised.value)
    assert "did you mean ORDERBUS_RELAY?" in text
    assert "ORDERBUS_POOL_SIZE='none'" in text
    assert "ORDERBUS_GRACE_S=-1.0" in text
    assert "must begin with one of amqp://" in text
    assert "s3cret" not in text


def test_a_broker_is_required() -> None:
    with pytest.raises(SettingsError, match="ORDERBUS_BROKER_URL: is required"):
        Settings.load({})


def test_variables_for_tests_are_not_settings() -> None:
    assert Settings.load({**BROKER, "ORDERBUS_TEST_BROKER_URL": "amqp://elsewhere"}).broker_url == "memory://"


def test_settings_are_printed_without_passwords() -> None:
    settings = Settings(broker_url="amqp://guest:s3cret@host:5672/", database_url="postgresql://u:s3cret@host/db")

    assert "s3cret" not in repr(settings)
    assert "guest:***@host:5672" in repr(settings)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://shop:pass#word@db/shop",
        "postgresql://shop:pass?word@db/shop",
        "amqp://shop:pass/word@rabbit/shop",
        "amqp://shop:pa@ss/word@rabbit/shop",
        "host=db user=shop password=password",
        "shop:password@rabbit/shop",
    ],
)
def test_a_password_that_breaks_its_url_is_not_printed_either(url: str) -> None:
    shown = masked(url)

    assert "word" not in shown
    assert "pa" not in shown
    assert shown.endswith("***")


def test_a_url_that_can_t_be_read_is_not_quoted() -> None:
    with pytest.raises(SettingsError, match="can't be read as a URL") as raised:
        Settings.load({"ORDERBUS_BROKER_URL": "amqp://shop:[password]@rabbit/shop"})

    assert "password]" not in str(raised.value)
    assert "'password'" not in str(raised.value)


def mistakes_in(environment: dict[str, str], given: Settings | None = None) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        Settings.load(environment, given)
    return raised.value.mistakes


def test_a_missing_broker_is_told_with_both_ways_to_name_one() -> None:
    assert mistakes_in({}) == [
        "ORDERBUS_BROKER_URL: is required; for RabbitMQ amqp://user:password@host:5672/vhost, "
        "to try things out without a server memory://"
    ]


def test_each_url_is_told_by_its_name_with_the_schemes_it_takes() -> None:
    odd = {f"ORDERBUS_{name}_URL": "ftp://u:s3cret@host/" for name in ("BROKER", "MANAGEMENT", "DATABASE", "REDIS")}

    assert mistakes_in(odd) == [
        "ORDERBUS_BROKER_URL=ftp://u:***@host/: must begin with one of amqp://, amqps://, memory://",
        "ORDERBUS_MANAGEMENT_URL=ftp://u:***@host/: must begin with one of http://, https://",
        "ORDERBUS_DATABASE_URL=ftp://u:***@host/: must begin with one of postgresql://, postgres://, embedded://, memory://",
        "ORDERBUS_REDIS_URL=ftp://u:***@host/: must begin with one of redis://, rediss://, unix://",
    ]


def test_a_url_that_can_t_be_read_does_not_hide_the_mistakes_in_those_after_it() -> None:
    environment = {"ORDERBUS_BROKER_URL": "amqp://shop:[x]@rabbit/", "ORDERBUS_REDIS_URL": "ftp://host"}

    assert [mistake.partition("_URL")[0] for mistake in mistakes_in(environment)] == ["ORDERBUS_BROKER", "ORDERBUS_REDIS"]


@pytest.mark.parametrize("url", ["embedded", "memory://", "postgres://db/shop", "postgresql://db/shop"])
def test_a_database_may_be_embedded_in_memory_or_a_server(url: str) -> None:
    assert Settings.load({**BROKER, "ORDERBUS_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize("url", ["http://rabbit", "https://u:p@rabbit:443", "http://rabbit:1"])
def test_a_management_api_is_a_host_and_maybe_a_port(url: str) -> None:
    assert Settings.load({**BROKER, "ORDERBUS_MANAGEMENT_URL": url}).management_url == url


@pytest.mark.parametrize("url", ["http://", "http://:15672", "http://rabbit:0", "http://rabbit:web", "http://rabbit:70000"])
def test_a_management_api_without_a_host_or_with_a_wrong_port_is_a_mistake(url: str) -> None:
    assert mistakes_in({**BROKER, "ORDERBUS_MANAGEMENT_URL": url}) == [
        f"ORDERBUS_MANAGEMENT_URL={url}: names no host or a wrong port; write http://host:15672"
    ]


def test_variables_of_others_in_between_do_not_end_the_reading() -> None:
    environment = {"HOME": "/", "ORDERBUS_LOG_LEVEL": "debug", "ORDERBUS_TEST_X": "1", **BROKER, "ORDERBUS_POOL_SIZE": "3"}

    assert Settings.load(environment).pool_size == 3


def test_an_unknown_name_that_is_like_none_is_answered_with_all_there_are() -> None:
    [mistake] = mistakes_in({**BROKER, "ORDERBUS_XYZZY": "1"})

    assert mistake.startswith(
        "ORDERBUS_XYZZY: there is no such setting; there are ORDERBUS_BROKER_URL, ORDERBUS_MANAGEMENT_URL, "
    )
    assert mistake.endswith(", ORDERBUS_RELAY_LEASE_S, ORDERBUS_SIGNING_KEYS")


def test_signing_keys_that_are_none_are_a_mistake_and_printed_by_their_ids() -> None:
    assert mistakes_in({**BROKER, "ORDERBUS_SIGNING_KEYS": "a:czNjcmV0"}) == [
        "ORDERBUS_SIGNING_KEYS: the key 'a' has 6 bytes; at least 32: make one with `openssl rand -base64 32`"
    ]
    assert "signing_keys='a:***'" in repr(Settings(signing_keys="a:czNjcmV0"))
    assert "signing_keys='***'" in repr(Settings(signing_keys=b"s3cret"))  # type: ignore[arg-type]
    assert "signing_keys=None" in repr(Settings())


def test_settings_are_printed_as_the_call_that_makes_them() -> None:
    assert repr(Settings(pool_size=3)).startswith("Settings(broker_url=None, management_url=None, ")
    assert "grace_s=20.0, max_body_bytes=1048576, dedupe_window_s=604800.0, pool_size=3, " in repr(Settings(pool_size=3))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://rabbit/shop", "amqp://rabbit/shop"),
        ("postgresql://db/shop?sslmode=require", "postgresql://db/shop?sslmode=require"),
        ("embedded", "embedded"),
        ("redis://:s3cret@host/0", "redis://:***@host/0"),
        ("amqp://u:s3cret@host:5672/shop?heartbeat=5#x", "amqp://u:***@host:5672/shop"),
        ("amqp://u:s3@cret@host/", "amqp://u:***@host/"),
        ("postgresql://db/shop?password=s3cret", "postgresql://:***@db/shop"),
        ("u:s3cret@host", "***"),
        ("password=s3cret", "***"),
        ("amqp://u:[s3cret@host/", "***"),
    ],
)
def test_a_url_is_printed_without_its_password_and_otherwise_as_it_is(url: str, shown: str) -> None:
    assert masked(url) == shown
