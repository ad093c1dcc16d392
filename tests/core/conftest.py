"""A bus without handlers."""

import pytest

from orderbus import Bus


@pytest.fixture
def bus() -> Bus:
    return Bus("payments")
