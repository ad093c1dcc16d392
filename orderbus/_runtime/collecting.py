"""The garbage collector of a process that handles events all day."""

from __future__ import annotations

import gc

YOUNG = 20_000
"""Objects that must pile up before the collector looks: a batch in flight makes a few thousand, and frees them by itself."""


def collect_rarely() -> None:
    """Have Python's collector run seldom; for a process whose main business is its bus, called once everything is open.

    Reference counting frees what handlers and the library make; the collector, with its default of 700 objects, looks for cycles in
    the middle of every batch, and again through all that was imported: a tenth of the CPU of a busy process. What exists now is
    put out of its sight (`gc.freeze`), and it looks after 20,000 new objects. Cycles of your own are still found, later: by at most
    20,000 objects. `orderbus run` calls it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)
