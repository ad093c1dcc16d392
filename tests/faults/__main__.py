"""`make faults [ONLY=part,of,names] [SEED=n] [ROUNDS=n] [JOBS=n] [RATE=n]`: break everything, count, print a table, write build/faults.json."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
from collections.abc import Sequence

import msgspec

from tests.faults.jobs import results_of, spread
from tests.faults.scenario import BUILD, RATE, Result, Scenario, all_scenarios

COLUMNS = ("sent", "lost", "doubled", "ghosts", "disordered", "innocents_parked", "misparked", "recovery_s", "seconds")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the jobs end with it
    arguments = _arguments()
    chosen = choose(all_scenarios(), arguments.only)
    if arguments.list:
        print(*(f"{one.group}/{one.name}" for one in chosen), sep="\n")
        return 0
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1_000_000)
    print(
        f"{len(chosen)} scenarios, SEED={seed} ROUNDS={arguments.rounds} JOBS={arguments.jobs} RATE={arguments.rate:g}",
        flush=True,
    )
    shutil.rmtree(BUILD, ignore_errors=True)
    results: list[Result] = []
    try:
        names = spread([one.name for one in chosen], arguments.jobs)
        tasks = [(name, seed + turn) for turn in range(arguments.rounds) for name in names]
        for result in results_of(tasks, arguments.jobs, arguments.rate):
            results.append(result)
            print(line(result), flush=True)
    finally:
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD.parent / "faults.json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    failed = [result for result in results if not result.passed]
    print("\n" + table(results))
    for result in failed:
        print(f"\n{result.name}, SEED={result.seed}:", *result.words, sep="\n  ")
    print(f"\n{len(results) - len(failed)} of {len(results)} passed; build/faults.json has the figures, build/faults/ the logs")
    return 1 if failed else 0


def choose(scenarios: dict[str, Scenario], only: Sequence[str]) -> list[Scenario]:
    """All, or those whose name or group contains one of the words. Ends the program where a word chooses none."""
    for word in only:
        if not any(word in f"{one.group}/{one.name}" for one in scenarios.values()):
            sys.exit(f"no scenario has {word!r} in its name; there are: {', '.join(scenarios)}")
    return [one for one in scenarios.values() if not only or any(word in f"{one.group}/{one.name}" for word in only)]


def line(result: Result) -> str:
    recovery = f", recovered in {result.recovery_s:.1f} s" if result.recovery_s else ""
    end = "ok" if result.passed else "FAILED: " + "; ".join(word.strip().splitlines()[-1] for word in result.words)
    return f"{result.name} (seed {result.seed}): {result.sent} sent, {result.seconds:.0f} s{recovery}: {end}"


def table(results: Sequence[Result]) -> str:
    rows = [("scenario", "seed", "", *(name.replace("_", " ") for name in COLUMNS))]
    for result in results:
        cells = [_cell(getattr(result, name)) for name in COLUMNS]
        rows.append((result.name, str(result.seed), "ok" if result.passed else "FAILED", *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", type=_words, default=[], help="parts of names or groups, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the names, and end")
    parser.add_argument("--seed", type=int, help="the first round's; each further round's is one more")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, each on servers of its own")
    parser.add_argument("--rate", type=float, default=RATE, help="events a second")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.jobs) < 1 or arguments.rate <= 0:
        parser.error("--rounds, --jobs and --rate must be more than 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
