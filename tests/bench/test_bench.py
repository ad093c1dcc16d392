"""The bench: what it says when it can't run, what its tables are made of, and that a loss can't hide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import Result as Outcome
from typer.testing import CliRunner

from bench import cli, running, wire
from bench.child import Fault, Gate, OrderTally, PassingFailure, Report, Tally, percentiles
from bench.cli import app
from bench.ground import Ground
from bench.job import Job
from bench.peers import PEERS, Peer
from bench.results import Result, Round, read, summarize, write
from bench.table import markdown
from bench.workloads import Variant, Workload, workloads
from tests.servers import free_port

ROUND = Round(
    seconds=1.0,
    count=1000,
    messages_per_s=1000.0,
    client_cpu_us=50.0,
    server_cpu_us=20.0,
    peak_rss_mib=30.0,
    p50_ms=None,
    p99_ms=None,
    lost=0,
    doubled=0,
    left=0,
)


def run(*arguments: str) -> Outcome:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def result(peer: str = "orderbus", *rates: float, workload: str = "consume", variant: str = "250 B", **changed: object) -> Result:
    rounds = [msgspec.structs.replace(ROUND, messages_per_s=rate, **changed) for rate in rates or (1000.0,)]
    return summarize(workload, variant, peer, "message", rounds, {"pamqp": "4.0"})


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where nothing listens."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("ORDERBUS_BROKER_URL", f"amqp://guest:guest@{address}/")
    monkeypatch.setenv("ORDERBUS_DATABASE_URL", f"postgresql://postgres@{address}/postgres")
    return address


@pytest.fixture
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ground that needs no server, for rounds that are made up."""
    _stand_on(Ground("amqp://nowhere/", "", ""), monkeypatch)


def _stand_on(place: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def ground(servers: frozenset[str]) -> Iterator[Ground]:
        yield place

    monkeypatch.setattr(cli, "ground", ground)


class TestCommandLine:
    def test_every_workload_is_listed_with_what_its_peers_lack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PEERS, "raw", Peer("raw", ("no-such-package",), "raw"))

        outcome = run("list")

        assert outcome.exit_code == 0
        assert all(name in outcome.stdout for name in workloads())
        assert "raw (not" in outcome.stdout

    def test_an_unknown_workload_is_named_beside_those_there_are(self, no_server: str) -> None:
        outcome = run("run", "consum")

        assert outcome.exit_code == 1
        assert "bench: there is no workload 'consum'; there are publish, consume" in outcome.stderr

    def test_an_unknown_peer_is_named_beside_those_there_are(self, no_server: str) -> None:
        outcome = run("run", "consume", "--peer", "rabbit")

        assert outcome.exit_code == 1
        assert "consume has no peer 'rabbit'; it has orderbus, raw, " in outcome.stderr

    def test_a_missing_server_is_told_with_its_address_and_the_way_to_another(self, no_server: str) -> None:
        outcome = run("run", "consume")

        assert outcome.exit_code == 1
        assert f"bench: consume: RabbitMQ does not answer at {no_server}" in outcome.stderr
        assert "start it, or set ORDERBUS_BROKER_URL" in outcome.stderr

    def test_after_what_can_not_be_run_the_next_is_tried(self, no_server: str) -> None:
        outcome = run("run", "consum", "consume", "publish")

        assert outcome.exit_code == 1
        assert [
            line.split(":")[1].split()[0]
            for line in outcome.stderr.splitlines()
            if line.startswith("bench: ") and "does not answer" in line
        ] == [
            "consume",
            "publish",
        ]

    @pytest.mark.usefixtures("somewhere")
    def test_a_peer_that_is_not_installed_is_left_out_and_the_others_run(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(PEERS, "aiormq", Peer("aiormq_", ("no-such-package",), "aiormq"))
        monkeypatch.setattr(running, "one_round", lambda *_: ROUND)
        json = tmp_path / "bench.jsonl"

        outcome = run("run", "consume", "--peer", "raw", "--peer", "aiormq", "--rounds", "2", "--json", str(json))

        assert outcome.exit_code == 1
        assert "consume: aiormq is left out: no-such-package is not installed; `make bench-setup` installs" in outcome.stderr
        assert [one.peer for one in read(json)] == ["orderbus", "raw", "orderbus", "raw"]

    @pytest.mark.usefixtures("somewhere")
    def test_a_peer_that_nobody_asked_for_may_be_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in set(workloads()["consume"].peers) - {"orderbus", "raw"}:
            monkeypatch.setitem(PEERS, name, Peer(name, ("no-such-package",), name))
        monkeypatch.setattr(running, "one_round", lambda *_: ROUND)

        outcome = run("run", "consume", "--json", str(tmp_path / "bench.jsonl"))

        assert outcome.exit_code == 0
        assert "aiormq is left out" in outcome.stderr

    @pytest.mark.usefixtures("somewhere")
    def test_a_peer_that_fails_is_left_out_with_its_last_words_and_the_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def one_round(workload: Workload, variant: Variant, peer: str, ground: Ground, scale: float) -> Round:
            if peer == "orderbus":
                raise running.Failed("it ended with code 1; KeyError: [red]'x'")
            return ROUND

        monkeypatch.setattr(running, "one_round", one_round)
        json = tmp_path / "bench.jsonl"

        outcome = run("run", "consume", "--peer", "raw", "--json", str(json))

        assert outcome.exit_code == 1
        assert "consume, 250 B: orderbus is left out: it ended with code 1; KeyError: [red]'x'" in outcome.stderr
        assert {one.peer for one in read(json)} == {"raw"}
        assert "×" not in outcome.stdout  # nothing to compare with

    @pytest.mark.usefixtures("somewhere")
    @pytest.mark.parametrize(
        ("planted", "told"),
        [
            ({"lost": 1}, "lost 1"),
            ({"doubled": 2}, "doubled 2"),
            ({"left": 3}, "left 3"),
            ({"more": {"disordered": 4.0}}, "disordered 4"),
        ],
    )
    def test_what_was_planted_in_one_of_five_rounds_is_told_and_fails_the_run(
        self, planted: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        clean = msgspec.structs.replace(ROUND, more={"disordered": 0.0})
        rounds = {
            "orderbus": iter([clean] * 10),
            "raw": iter([clean, clean, msgspec.structs.replace(clean, **planted), *[clean] * 7]),
        }
        monkeypatch.setattr(running, "one_round", lambda workload, variant, peer, ground, scale: next(rounds[peer]))

        outcome = run("run", "consume", "--peer", "raw", "--rounds", "5", "--json", str(tmp_path / "bench.jsonl"))

        assert outcome.exit_code == 1
        assert [line for line in outcome.stderr.splitlines() if line.startswith("!")] == [f"! consume, 250 B, raw: {told}"]


class TestTables:
    def test_rounds_that_began_on_busy_servers_are_told_of(self) -> None:
        quiet, busy = result("orderbus", 900.0, 1000.0), result("raw", 450.0, 500.0, settled=False)

        assert "orderbus: rounds_on_busy_servers" not in markdown([quiet, busy])
        assert "raw: rounds_on_busy_servers 2" in markdown([quiet, busy])

    def test_a_table_and_a_plot_need_nothing_but_the_file(self, no_server: str, tmp_path: Path) -> None:
        json, picture = tmp_path / "bench.jsonl", tmp_path / "deep" / "bench.svg"
        write(json, [result("orderbus", 900.0, 1000.0, 1100.0), result("raw", 450.0, 500.0, 550.0)])

        table = run("table", "--json", str(json))
        plot = run("plot", "--json", str(json), "--output", str(picture))

        assert table.exit_code == plot.exit_code == 0
        assert "| **orderbus** | 1,000 | 900..1,100 |  |" in table.stdout
        assert "| raw (pamqp 4.0) | 500 | 450..550 | 2.00× |" in table.stdout
        bars = [one.get("class") for one in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}rect")]
        assert bars == ["paper", "ours", "bar"]

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        outcome = run("table", "--json", str(tmp_path / "none.jsonl"))

        assert outcome.exit_code == 1
        assert f"{tmp_path}/none.jsonl is not there; `python -m bench run WORKLOAD" in outcome.stderr

    def test_a_workload_that_was_not_measured_is_named(self, tmp_path: Path) -> None:
        json = tmp_path / "bench.jsonl"
        write(json, [result()])

        assert run("table", "consume", "--json", str(json)).exit_code == 0
        outcome = run("table", "publish", "--json", str(json))

        assert outcome.exit_code == 1
        assert "has no results of 'publish'" in outcome.stderr

    def test_a_ratio_is_taken_between_rounds_that_stood_beside_each_other(self) -> None:
        slower_and_slower = [result("orderbus", 400.0, 200.0, 100.0), result("raw", 200.0, 100.0, 50.0)]

        assert "| 2.00× |" in markdown(slower_and_slower)

    def test_a_loss_is_in_the_row(self) -> None:
        assert "| 3, 0, 0 |" in markdown([result("orderbus", 1.0, 1.0, 1.0, lost=1)])

    def test_results_that_came_into_the_file_apart_are_one_table(self, tmp_path: Path) -> None:
        json = tmp_path / "bench.jsonl"
        write(json, [result("orderbus")])
        write(json, [result("orderbus", workload="publish")])
        write(json, [result("raw", 500.0)])

        assert markdown(read(json)).count("**consume, 250 B**") == 1
        assert "2.00×" in markdown(read(json))

    def test_a_peer_that_was_measured_again_is_replaced(self, tmp_path: Path) -> None:
        json = tmp_path / "bench.jsonl"
        write(json, [result("orderbus", 1000.0), result("raw", 500.0)])
        write(json, [result("orderbus", 2000.0)])

        assert [(one.peer, one.messages_per_s) for one in read(json)] == [("orderbus", 2000.0), ("raw", 500.0)]


class TestCounting:
    def test_what_never_came_is_lost_and_what_came_again_is_doubled(self) -> None:
        ends: list[str] = []
        tally = Tally(4, lambda: ends.append("all seen"))
        for number in (0, 1, 1, 1, 3):
            tally.saw(number)

        report = tally.report(Gate())

        assert (report.lost, report.doubled, ends) == (1, 2, [])

    def test_the_end_is_told_once_when_the_last_missing_one_comes(self) -> None:
        ends: list[str] = []
        tally = Tally(2, lambda: ends.append("all seen"))
        for number in (1, 1, 0, 0):
            tally.saw(number)

        assert ends == ["all seen"]

    def test_a_message_that_comes_after_a_later_one_of_its_key_is_disordered(self) -> None:
        tally = OrderTally(5, lambda: None)
        for key, number in (("a", 0), ("b", 3), ("a", 2), ("a", 1), ("b", 4)):
            tally.saw_of(key, number)

        assert tally.report(Gate()).more == {"disordered": 1}

    def test_every_tenth_message_fails_once(self) -> None:
        fault = Fault(30)

        def tries(number: int) -> int:
            try:
                fault.strike(number)
            except PassingFailure:
                return 1 + tries(number)
            return 1

        assert [number for number in range(30) if tries(number) == 2] == [9, 19, 29]
        assert sum(map(tries, range(30))) == 30

    @pytest.mark.parametrize(
        ("latencies_s", "expected"), [([], (0, 0)), ([0.5], (500, 500)), ([n / 1000 for n in range(101)], (50, 99))]
    )
    def test_percentiles_are_in_milliseconds(self, latencies_s: Sequence[float], expected: tuple[float, float]) -> None:
        assert percentiles(latencies_s) == pytest.approx(expected)


class TestWorkloads:
    @pytest.mark.parametrize("workload", workloads().values(), ids=lambda workload: workload.name)
    def test_names_peers_that_exist_orderbus_first(self, workload: Workload) -> None:
        assert workload.peers[0] == "orderbus"
        assert set(workload.peers) <= set(PEERS)
        assert set(workload.shares) <= set(workload.peers)
        assert all(set(variant.peers or ()) <= set(workload.peers) for variant in workload.variants)

    @pytest.mark.parametrize("workload", workloads().values(), ids=lambda workload: workload.name)
    def test_names_peers_whose_program_has_it(self, workload: Workload) -> None:
        if workload.measure is not None:
            return
        for peer in workload.peers:
            program = Path(cli.__file__).parent / "peers" / f"{PEERS[peer].module}.py"
            assert f'"{workload.name}":' in program.read_text(), f"{peer} has no {workload.name}"


@pytest.mark.servers
def test_consume_runs_on_a_real_server_and_nothing_is_lost(
    vhost_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(PEERS, "aiormq", Peer("aiormq_", ("no-such-package",), "aiormq"))
    _stand_on(Ground(vhost_url, "", ""), monkeypatch)
    json = tmp_path / "bench.jsonl"

    outcome = run("run", "consume", "--peer", "raw", "--rounds", "1", "--scale", "0.005", "--json", str(json))

    assert outcome.exit_code == 0, outcome.stderr
    found = read(json)
    assert [(one.variant, one.peer) for one in found] == [
        ("250 B", "orderbus"),
        ("250 B", "raw"),
        ("4 KiB", "orderbus"),
        ("4 KiB", "raw"),
    ]
    assert [(one.count, one.wrong) for one in found] == [(500, ""), (500, ""), (300, ""), (300, "")]
    assert all(one.messages_per_s > 0 and one.peak_rss_mib > 0 for one in found)


@pytest.mark.servers
def test_a_message_that_stays_in_the_queue_is_counted_as_left(vhost_url: str) -> None:
    consume = workloads()["consume"]
    job = Job(workload="consume", variant="250 B", peer="raw", topic="left", count=7, body_bytes=250, broker_url=vhost_url)
    with wire.Wire(vhost_url) as connection:
        connection.declare(job.queue)
    wire.fill(job)

    counted = consume.verify(Ground(vhost_url, "", ""), job, Report(1.0, 7))

    assert counted.left == 7


@pytest.mark.servers
def test_a_queue_that_misses_a_number_and_has_another_twice_is_told(vhost_url: str) -> None:
    job = Job(workload="publish", variant="250 B", peer="raw", topic="drained", count=600, body_bytes=250, broker_url=vhost_url)
    envelope = wire.Envelope("", job.queue, job.topic)
    with wire.Wire(vhost_url) as connection:
        connection.declare(job.queue)
    wire.fill(
        job, lambda sample: envelope.frames(wire.event_id(0), str(sample.order_id), b'{"number":%d}' % max(sample.number, 1))
    )

    lost, doubled = wire.drain(vhost_url, job.queue, job.count)

    assert (lost, doubled) == (1, 1)
    with wire.Wire(vhost_url) as connection:
        connection.delete(job.queue)
