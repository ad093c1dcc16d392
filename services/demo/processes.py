"""The demo's child processes: started, watched, killed when asked, stopped; and the CPU that everything used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil

STOP_S = 40.0
SERVER_NAMES = ("postgres", "beam.smp", "redis-server")


class ChildFailed(RuntimeError):
    """A service ended by itself; the text says which, and the last lines that it wrote."""


class Child:
    """One service as a process. Its stderr goes to `folder`/NAME.log, its stdout, with its receipts, to NAME.out."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self._arguments = arguments
        self._environment = {**os.environ, **environment}
        self.log = folder / f"{name}.log"
        self.out = folder / f"{name}.out"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log, self.out.open("ab") as out:
            self._process = subprocess.Popen([sys.executable, *self._arguments], env=self._environment, stdout=out, stderr=log)

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and time to drain. The exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def check(self) -> None:
        """Raises ChildFailed when it has ended by itself."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise ChildFailed(f"{self.name} ended with code {self._process.returncode}:\n{_tail(self.log) or _tail(self.out)}")

    def has_said(self, words: str) -> bool:
        return any(words.encode() in path.read_bytes() for path in (self.log, self.out))

    def wait(self, timeout_s: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def lines(self) -> list[bytes]:
        """Everything that it has written."""
        return [line for path in (self.log, self.out) for line in path.read_bytes().splitlines()]

    def told(self, event: str) -> list[dict[str, object]]:
        """The JSON lines of this kind that it printed, one after the other."""
        found = []
        for line in self.out.read_bytes().splitlines():
            try:
                line_of = msgspec.json.decode(line, type=dict[str, object])
            except msgspec.DecodeError:
                continue  # a line of another kind
            if line_of.get("event") == event:
                found.append(line_of)
        return found

    def receipts(self) -> list[dict[str, object]]:
        """The drain receipts that it printed."""
        return self.told("drained")


def wait_until_ready(url: str, children: Iterable[Child], timeout_s: float = 60.0) -> None:
    """Until the readiness probe answers 200. Raises ChildFailed when a child ends first, TimeoutError when it takes too long."""
    deadline = time.monotonic() + timeout_s
    waiting = list(children)
    while True:
        for child in waiting:
            child.check()
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} did not answer within {timeout_s:g} s: {error}") from error
        time.sleep(0.05)


def wait_until_said(words: str, children: Iterable[Child], timeout_s: float = 60.0) -> None:
    """Until each child has these words in its output. Raises ChildFailed when one ends first, TimeoutError when it takes too long."""
    deadline = time.monotonic() + timeout_s
    waiting = list(children)
    while waiting := [child for child in waiting if not child.has_said(words)]:
        for child in waiting:
            child.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{waiting[0].name} did not say {words!r} within {timeout_s:g} s")
        time.sleep(0.05)


class CpuMeter:
    """The CPU seconds of the demo's processes and of the servers that it uses, from its making on."""

    def __init__(self, children: Iterable[Child]) -> None:
        self._roots = {child.pid: child.name for child in children}
        self._names: dict[int, str] = {}
        self._began: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self.look()
        self._began = dict(self._latest)

    def add(self, child: Child) -> None:
        """A process started later counts from its start."""
        self._roots[child.pid] = child.name

    def look(self) -> None:
        """To be called now and then: a process that ends in between keeps what it had used."""
        for name, process in self._processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue  # it has just ended
            self._latest[process.pid] = times.user + times.system
            self._names[process.pid] = name

    def seconds(self) -> dict[str, float]:
        """By process, the busiest first; the servers' under their program's name."""
        found: dict[str, float] = {}
        for pid, used in self._latest.items():
            name = self._names[pid]
            found[name] = found.get(name, 0.0) + used - self._began.get(pid, 0.0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _processes(self) -> Iterable[tuple[str, psutil.Process]]:
        for pid, name in self._roots.items():
            try:
                root = psutil.Process(pid)
                yield name, root
                for child in root.children(recursive=True):
                    yield name, child
            except psutil.Error:
                continue  # it has ended
        for process in psutil.process_iter(["name"]):
            if process.info["name"] in SERVER_NAMES:
                yield process.info["name"], process


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
