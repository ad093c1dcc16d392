"""The compose stack as it is written; `make compose-test` runs it."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.faults.world import ROOT

COMPOSE = ROOT / "compose"
TEXT = (COMPOSE / "docker-compose.yml").read_text()
STACK: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
OURS = ("orders-api", "outbox-dispatcher", "payment", "inventory", "aggregator", "notification")
NODES = ("rabbitmq", "rabbitmq-2", "rabbitmq-3")
SECRETS = ("PASSWORD", "COOKIE", "KEY")
VARIABLE = re.compile(r"\$\{([A-Z_]+)(:?[-?])?")


OF_COMPOSE = {"name", "version", "include", "services", "networks", "volumes", "configs", "secrets"}
OF_A_SERVICE = {
    *("annotations", "attach", "blkio_config", "build", "cap_add", "cap_drop", "cgroup", "cgroup_parent", "command", "configs"),
    *(
        "container_name",
        "cpu_count",
        "cpu_percent",
        "cpu_period",
        "cpu_quota",
        "cpu_rt_period",
        "cpu_rt_runtime",
        "cpu_shares",
        "cpus",
    ),
    *(
        "cpuset",
        "credential_spec",
        "depends_on",
        "deploy",
        "develop",
        "device_cgroup_rules",
        "devices",
        "dns",
        "dns_opt",
        "dns_search",
    ),
    *("domainname", "entrypoint", "env_file", "environment", "expose", "extends", "external_links", "extra_hosts", "group_add"),
    *("healthcheck", "hostname", "image", "init", "ipc", "isolation", "labels", "links", "logging", "mac_address", "mem_limit"),
    *(
        "mem_reservation",
        "mem_swappiness",
        "memswap_limit",
        "network_mode",
        "networks",
        "oom_kill_disable",
        "oom_score_adj",
        "pid",
    ),
    *(
        "pids_limit",
        "platform",
        "ports",
        "privileged",
        "profiles",
        "pull_policy",
        "read_only",
        "restart",
        "runtime",
        "scale",
        "secrets",
    ),
    *("security_opt", "shm_size", "stdin_open", "stop_grace_period", "stop_signal", "storage_opt", "sysctls", "tmpfs", "tty"),
    *("ulimits", "user", "userns_mode", "volumes", "volumes_from", "working_dir"),
}
WITHIN = {
    "build": {"context", "dockerfile", "dockerfile_inline", "args", "target", "cache_from", "labels", "network", "shm_size"},
    "healthcheck": {"test", "interval", "timeout", "retries", "start_period", "start_interval", "disable"},
    "logging": {"driver", "options"},
}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}
"""What the Compose Specification knows: a misspelled key is refused by some versions, and passed over by others."""


def test_there_are_only_keys_that_compose_knows() -> None:
    assert {key for key in STACK if not key.startswith("x-")} <= OF_COMPOSE
    assert all(not one or one.keys() <= {"internal", "driver", "name"} for one in STACK["networks"].values())
    assert not any(STACK["volumes"].values())


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_only_keys_that_compose_knows_and_names_what_there_is(name: str) -> None:
    service = SERVICES[name]
    assert service.keys() <= OF_A_SERVICE
    for key, known in WITHIN.items():
        assert service.get(key, {}).keys() <= known, key
    for other, how in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert how.keys() == {"condition"}
        assert how["condition"] in CONDITIONS
        if how["condition"] == "service_healthy":
            assert SERVICES[other]["healthcheck"]["test"]
    assert set(service["networks"]) <= STACK["networks"].keys()
    sources = {volume.partition(":")[0] for volume in service.get("volumes", ())}
    assert {source for source in sources if source[0] not in "./"} <= STACK["volumes"].keys()
    assert all((COMPOSE / source).exists() for source in sources if source.startswith("./"))


def test_somebody_waits_for_whatever_ends_by_itself() -> None:
    """For `up --wait` takes a container that has ended for one that failed, unless another was to start after it."""
    ends = {name for name, service in SERVICES.items() if service.get("restart") == "no"} - {"load"}
    awaited = {
        other
        for service in SERVICES.values()
        for other, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    assert awaited == ends


def test_logstash_may_run_as_root() -> None:
    assert SERVICES["logstash"]["user"] == "root"
    assert SERVICES["logstash"]["environment"]["ALLOW_SUPERUSER"] == "true"  # else it ends at once, since 9.0


def test_env_example_has_every_variable_and_no_other() -> None:
    example = (COMPOSE / ".env.example").read_text()
    named = set(re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE))
    assert named == {name for name, _ in VARIABLE.findall(TEXT)} | {"COMPOSE_PROJECT_NAME"}


def test_env_example_gives_the_defaults_of_the_stack() -> None:
    defaults = dict(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", TEXT))
    for name, value in re.findall(r"^# ([A-Z_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.MULTILINE):
        assert defaults[name] == value, name


def test_secrets_have_no_default() -> None:
    for name, kind in VARIABLE.findall(TEXT):
        if name in (
            "ELASTIC_PASSWORD",
            "KIBANA_PASSWORD",
            "KIBANA_KEY",
        ):  # of a profile that few start; the others must start without
            assert kind == ":-"
        else:
            assert name.endswith(SECRETS) == (kind == ":?"), name


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_the_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_memory_is_bounded(name: str) -> None:
    service = SERVICES[name]
    image = re.fullmatch(r"\$\{[A-Z]+_IMAGE:-[\w./-]+:([\w.-]+)\}", service["image"])
    assert image is not None
    assert image[1] != "latest"
    assert "mem_limit" in service


def test_what_runs_on_has_a_health_check() -> None:
    run_once = {name for name, service in SERVICES.items() if service.get("restart") == "no"}
    without = {name for name, service in SERVICES.items() if "test" not in service.get("healthcheck", {})} - run_once
    assert without == {"collector"}, "its image has nothing to ask with"


@pytest.mark.parametrize("name", OURS)
def test_a_service_may_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["healthcheck"]["test"]
    assert {"prepare", "rabbitmq", "redis"} <= service["depends_on"].keys()
    assert re.search(r"^USER 10001", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)


def test_only_servers_and_services_share_the_servers_network() -> None:
    assert STACK["networks"]["servers"]["internal"]
    assert {name for name, service in SERVICES.items() if "servers" in service["networks"]} == {
        *OURS,
        *NODES,
        "prepare",
        "postgres",
        "redis",
        "metricbeat",
        "load",
    }


def test_the_nodes_that_clients_go_to_are_chosen_in_one_place() -> None:
    for name in (*OURS, "load"):
        assert SERVICES[name]["environment"]["ORDERBUS_BROKER_URL"].endswith("@${RABBITMQ_HOSTS:-rabbitmq}/")
    assert f"with the profile cluster {','.join(NODES)}\n# RABBITMQ_HOSTS=rabbitmq\n" in (COMPOSE / ".env.example").read_text()


def test_nodes_that_join_come_after_the_one_that_they_join_and_share_its_cookie() -> None:
    listed = re.findall(
        r"^cluster_formation\S+nodes\.\d = rabbit@(\S+)$", (COMPOSE / "rabbitmq" / "join.conf").read_text(), re.MULTILINE
    )
    assert tuple(listed) == NODES
    assert {SERVICES[name]["environment"]["RABBITMQ_ERLANG_COOKIE"] for name in NODES} == {
        "${RABBITMQ_COOKIE:?see compose/.env.example}"
    }
    for name in NODES:
        joins = any("join.conf" in volume for volume in SERVICES[name]["volumes"])
        assert SERVICES[name]["hostname"] == name
        assert joins == (SERVICES[name]["profiles"] == ["cluster"]) == (name != "rabbitmq")
        assert ("rabbitmq" in SERVICES[name].get("depends_on", ())) == joins


def test_the_load_waits_for_all_services_and_keeps_its_report() -> None:
    load = SERVICES["load"]
    assert load["restart"] == "no"
    assert {name for name, how in load["depends_on"].items() if how == {"condition": "service_healthy"}} == set(OURS)
    assert load["volumes"] == ["reports:/srv/build"]
    chosen = dict(argument.removeprefix("--").split("=", 1) for argument in load["command"] if argument.startswith("--"))
    assert {name: VARIABLE.sub("", value).strip("}-") for name, value in chosen.items()} == {
        "url": "http://orders-api:8000",
        "profile": "steady",
        "rate": "200",
        "seconds": "60",
    }


@pytest.mark.parametrize("name", SERVICES)
def test_logs_are_bounded_whatever_is_away_or_full(name: str) -> None:
    assert SERVICES[name]["logging"] == {"driver": "json-file", "options": {"max-size": "20m", "max-file": "3"}}


def test_prometheus_looks_for_the_services_that_there_are() -> None:
    config = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())
    (job,) = [one for one in config["scrape_configs"] if one["job_name"] == "orderbus"]
    assert sorted(one["targets"][0] for one in job["static_configs"]) == sorted(f"{name}:9464" for name in OURS)
    assert all(one["targets"] == [f"{one['labels']['service']}:9464"] for one in job["static_configs"])
    elastic = yaml.safe_load((COMPOSE / "elastic" / "collector.yml").read_text())["receivers"]["prometheus"]["config"]
    for one in (*config["scrape_configs"], *elastic["scrape_configs"]):
        if one["job_name"].startswith("rabbitmq"):
            assert one["dns_sd_configs"][0]["names"] == list(NODES)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--profile", "core", "--profile", "clustre", "up"], {}),
        (["--profile=clustre", "up"], {}),
        (["up"], {"COMPOSE_PROFILES": "core,clustre"}),
    ],
)
def test_a_profile_that_there_is_not_is_refused_before_anything_is_started(
    arguments: list[str], environment: dict[str, str]
) -> None:
    done = subprocess.run(
        ["sh", str(COMPOSE / "scripts" / "compose.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "there is no profile 'clustre'; there are: cluster core elastic load observe"


def test_the_scripts_know_every_profile() -> None:
    profiles = {profile for service in SERVICES.values() for profile in service["profiles"]}
    assert set(re.findall(r"--profile (\w+)", (COMPOSE / "scripts" / "reset.sh").read_text())) == profiles
    assert set(re.findall(r"(\w+) \(", TEXT.partition("x-service")[0])) == profiles


@pytest.mark.parametrize("script", sorted((COMPOSE / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_a_shell_script_that_can_be_run(script: Any) -> None:
    assert script.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", str(script)], check=True, timeout=10)


def test_setup_makes_secrets_once(tmp_path: Any) -> None:
    folder = tmp_path / "compose"
    (folder / "scripts").mkdir(parents=True)
    for name in (".env.example", "scripts/setup.sh"):
        (folder / name).write_text((COMPOSE / name).read_text())
    for _ in range(2):
        subprocess.run(["sh", str(folder / "scripts" / "setup.sh")], check=True, capture_output=True, timeout=10)
    first = (folder / ".env").read_text()
    subprocess.run(["sh", str(folder / "scripts" / "setup.sh")], check=True, capture_output=True, timeout=10)

    assert (folder / ".env").read_text() == first
    assert (folder / ".env").stat().st_mode & 0o077 == 0
    secrets = dict(re.findall(rf"^(\w+_(?:{'|'.join(SECRETS)}))=(\w+)$", first, re.MULTILINE))
    assert len(secrets) == len(set(secrets.values())) == 7
    assert all(len(secret) == 48 for secret in secrets.values())
