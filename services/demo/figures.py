"""What the demo measured, beside what it should: the table and the files that it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run, flat, as written to build/demo.json. Rates per second, times in milliseconds, CPU of everything together."""

    mode: str
    seconds: float
    orders_accepted: int
    orders_completed: int
    accepted_per_s: float
    completed_per_s: float
    api_p50_ms: float
    api_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    error_ratio: float
    dlq_ratio: float
    retries: int
    lost: int
    doubled: int
    ghosts: int
    oversold: int
    money_off: int
    cpu_us_per_order: float

    @property
    def consistent(self) -> bool:
        return not (self.lost or self.doubled or self.ghosts or self.oversold or self.money_off)


class _Line(NamedTuple):
    label: str
    value: str
    target: str = ""
    reached: bool | None = None
    must: bool = False


def lines(figures: Figures, rate: float) -> list[_Line]:
    f = figures
    goal = min(rate * 0.95, 2000)
    return [
        _Line("orders accepted", f"{f.orders_accepted} ({f.accepted_per_s:.0f}/s)", f">= {goal:.0f}/s", f.accepted_per_s >= goal),
        _Line(
            "orders completed", f"{f.orders_completed} ({f.completed_per_s:.0f}/s)", f">= {goal:.0f}/s", f.completed_per_s >= goal
        ),
        _Line("API p50", f"{f.api_p50_ms:.1f} ms"),
        _Line("API p99", f"{f.api_p99_ms:.1f} ms", "<= 200 ms", f.api_p99_ms <= 200),
        _Line("end to end p50", f"{f.e2e_p50_ms:.0f} ms"),
        _Line("end to end p99", f"{f.e2e_p99_ms:.0f} ms", "<= 2000 ms", f.e2e_p99_ms <= 2000),
        _Line("errors", f"{f.error_ratio:.3%}", "<= 0.1 %", f.error_ratio <= 0.001),
        _Line("dead letters", f"{f.dlq_ratio:.3%}", "<= 0.1 %", f.dlq_ratio <= 0.001),
        _Line("retries", str(f.retries)),
        _Line("CPU of everything", f"{f.cpu_us_per_order:.0f} µs/order", "<= 1000", f.cpu_us_per_order <= 1000),
        _Line("lost", str(f.lost), "0", f.lost == 0, must=True),
        _Line("doubled", str(f.doubled), "0", f.doubled == 0, must=True),
        _Line("ghosts", str(f.ghosts), "0", f.ghosts == 0, must=True),
        _Line("oversold articles", str(f.oversold), "0", f.oversold == 0, must=True),
        _Line("money that doesn't add up", str(f.money_off), "0", f.money_off == 0, must=True),
    ]


def show(console: Console, figures: Figures, rate: float) -> None:
    """The table: each figure beside its target."""
    table = Table(title=f"Event Stream Orders, {figures.mode}: {figures.seconds:.0f} s at {rate:.0f} orders/s asked for")
    for column, side in (("figure", "left"), ("measured", "right"), ("target", "right"), ("", "left")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for line in lines(figures, rate):
        verdict = {None: "", True: "[green]reached[/]", False: "[bold red]VIOLATED[/]" if line.must else "[yellow]missed[/]"}[
            line.reached
        ]
        table.add_row(line.label, line.value, line.target, verdict)
    console.print(table)


def save(figures: Figures, path: Path) -> None:
    """build/demo.json: one flat object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
