"""A role of tests/faults/program.py whose wall clock is wrong: `FAULTS_CLOCK=600` seconds ahead, or `5:-600`, back after five seconds."""

from __future__ import annotations

import os
import runpy
import time


def set_wrong(text: str) -> None:
    """For everything in this process that asks `time.time`, from its import on."""
    after_s, colon, offset = text.rpartition(":")
    right, began = time.time, time.monotonic()

    def wrong() -> float:
        is_wrong = not colon or time.monotonic() - began >= float(after_s)
        return right() + (float(offset) if is_wrong else 0.0)

    time.time = wrong


if __name__ == "__main__":
    set_wrong(os.environ["FAULTS_CLOCK"])
    runpy.run_module("tests.faults.program", run_name="__main__", alter_sys=True)
