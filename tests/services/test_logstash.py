"""compose/elastic/logstash.conf: what it reads, and what of that it stores."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from compose.elastic.build import FOLDER
from tests.services.test_compose import OURS, SERVICES


class LogstashFile:
    """A pipeline of Logstash, read: the plugins of each section with their settings, and the conditions. Raises ValueError where it can't be."""

    TOKEN = re.compile(r"""\s+|#.*|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|=>|[=!<>]=|[=!]~|[{}\[\]()!,<>]|[\w.@-]+)""")

    def __init__(self, text: str) -> None:
        self.plugins: list[tuple[str, str, dict[str, Any]]] = []
        self.conditions: list[str] = []
        self._left: list[str] = []
        place = 0
        while place < len(text):
            token = self.TOKEN.match(text, place)
            if token is None:
                raise ValueError(f"nothing begins like this: {text[place : place + 20]!r}")
            place = token.end()
            self._left += [token[1]] if token[1] else []
        while self._left:
            section = self._take()
            if section not in ("input", "filter", "output"):
                raise ValueError(f"there is no section {section!r}")
            self._block(section)

    def _take(self, wanted: str = "") -> str:
        if not self._left or wanted not in ("", self._left[0]):
            raise ValueError(f"there is {' '.join(self._left[:5])!r} instead of {wanted or 'more'!r}")
        return self._left.pop(0)

    def _is_next(self, wanted: str) -> bool:
        return self._left[:1] == [wanted]

    def _block(self, section: str) -> None:
        self._take("{")
        while not self._is_next("}"):
            name = self._take()
            if name in ("if", "else"):
                condition = []
                while not self._is_next("{"):
                    condition.append(self._take())
                self.conditions.append("".join(condition))
                self._block(section)
            else:
                self.plugins.append((section, name, self._settings()))
        self._take("}")

    def _settings(self) -> dict[str, Any]:
        found = {}
        self._take("{")
        while not self._is_next("}"):
            name = self._take().strip("\"'")
            self._take("=>")
            found[name] = self._value()
        self._take("}")
        return found

    def _value(self) -> Any:
        if self._is_next("{"):
            return self._settings()
        if not self._is_next("["):
            return self._take().strip("\"'")
        self._take("[")
        values = [self._value()]
        while not self._is_next("]"):
            self._take(",")
            values.append(self._value())
        self._take("]")
        return values


LOGSTASH = (FOLDER / "logstash.conf").read_text()
OF_LOGSTASH: dict[tuple[str, str], set[str]] = {
    ("input", "file"): {
        *(
            "path",
            "codec",
            "mode",
            "start_position",
            "sincedb_path",
            "sincedb_write_interval",
            "stat_interval",
            "discover_interval",
        ),
        *(
            "close_older",
            "delimiter",
            "exclude",
            "ignore_older",
            "max_open_files",
            "file_chunk_size",
            "file_chunk_count",
            "tags",
            "id",
        ),
    },
    ("filter", "mutate"): {
        "copy",
        "rename",
        "remove_field",
        "add_field",
        "replace",
        "update",
        "convert",
        "gsub",
        "add_tag",
        "id",
    },
    ("filter", "json"): {"source", "target", "skip_on_invalid_json", "tag_on_failure", "ecs_compatibility", "id"},
    ("filter", "drop"): {"percentage", "id"},
    ("filter", "ruby"): {"code", "init", "path", "script_params", "tag_on_exception", "id"},
    ("output", "elasticsearch"): {
        *(
            "hosts",
            "user",
            "password",
            "api_key",
            "index",
            "pipeline",
            "timeout",
            "id",
            "ssl_enabled",
            "ssl_certificate_authorities",
        ),
        *("data_stream", "data_stream_type", "data_stream_dataset", "data_stream_namespace", "data_stream_auto_routing"),
    },
}
"""What Logstash 8 and 9 bring with them, as far as it is of use here: plugins, and settings of each."""


def test_the_pipeline_uses_plugins_and_settings_that_logstash_has() -> None:
    plugins = LogstashFile(LOGSTASH).plugins
    assert [(section, name) for section, name, _ in plugins] == list(OF_LOGSTASH)
    for section, name, settings in plugins:
        assert settings.keys() <= OF_LOGSTASH[section, name], name


@pytest.mark.parametrize(
    "damaged",
    [
        LOGSTASH.rstrip().removesuffix("}"),
        LOGSTASH.replace("drop {}", "drop {"),
        LOGSTASH.replace("drop {}", "drop"),
        LOGSTASH.replace("mode => ", "mode = "),
        LOGSTASH.replace('"tail"', '"tail'),
        LOGSTASH.replace("output {", "outputs {"),
        LOGSTASH + "}",
    ],
    ids=["end", "open", "no-block", "arrow", "quote", "section", "one-more"],
)
def test_a_damaged_pipeline_would_be_noticed(damaged: str) -> None:
    assert damaged != LOGSTASH
    with pytest.raises(ValueError, match=r"^nothing begins|^there is"):
        LogstashFile(damaged)


def test_only_what_our_services_say_is_stored() -> None:
    """Elasticsearch, Kibana and Metricbeat write lines of the common schema, too: a line for each that is stored would never end."""
    (condition,) = LogstashFile(LOGSTASH).conditions
    refused = re.fullmatch(
        r"!\[@metadata\]\[parsed\]\[ecs\.version\]or\[@metadata\]\[parsed\]\[service\.name\]notin\[(.*)\]", condition
    )
    assert refused is not None
    that_run = [name for name, one in SERVICES.items() if "ORDERBUS_IMAGE" in one["image"] and one["restart"] != "no"]
    assert refused[1].replace('"', "").split(",") == [name_in_logs(name) for name in that_run]
    assert sorted(that_run) == sorted(OURS)


def name_in_logs(service: str) -> str:
    """What a service of docker-compose.yml calls itself: as it is told, or its bus's group."""
    named: str | None = SERVICES[service]["environment"].get("OTEL_SERVICE_NAME")
    if named is not None:
        return named
    (module,) = [part.removesuffix(":bus") for part in SERVICES[service]["command"] if part.endswith(":bus")]
    group: str = importlib.import_module(module).bus.group
    return group
