"""The meter: servers that still do what the preparation left them are waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from bench import meter

SPINS = "print('on', flush=True)\nwhile True: pass"
SPINS_FOR_A_WHILE = "import signal, time\nprint('on', flush=True)\nwhile time.process_time() < 1: pass\nsignal.pause()"


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[psutil.Process]:
    """A process that runs the program of the parameter."""
    with subprocess.Popen([sys.executable, "-c", request.param], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield psutil.Process(child.pid)
        child.kill()


@pytest.mark.parametrize("process", [SPINS_FOR_A_WHILE], indirect=True)
def test_a_server_that_is_busy_with_what_came_before_is_waited_for(process: psutil.Process) -> None:
    assert meter.settle([process])
    assert meter.cpu_s([process]) >= 0.9


@pytest.mark.parametrize("process", [SPINS], indirect=True)
def test_one_that_never_rests_is_not_waited_for_for_ever(process: psutil.Process) -> None:
    assert not meter.settle([process], limit_s=1.0)
