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
