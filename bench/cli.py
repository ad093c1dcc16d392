"""`python -m bench`: list what can be measured, run it, and make tables and plots of what was found."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import plot as plots, table as tables
from bench.ground import Missing, ground
from bench.peers import PEERS
from bench.results import Result, read, versions_of, write
from bench.running import run as run_rounds
from bench.workloads import Workload, workloads

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
console = Console(stderr=True, highlight=False, soft_wrap=True)
RESULTS = Path("build/bench.jsonl")
JsonFile = Annotated[Path, typer.Option("--json", help="The results, as JSON lines")]


@app.command("list")
def list_() -> None:
    """Every workload with its variants and peers; a peer that is not installed is marked."""
    found = Table("workload", "what", "variants", "peers")
    for one in workloads().values():
        names = [name if _installed(name) else f"{name} (not installed)" for name in one.peers]
        found.add_row(one.name, one.what, ", ".join(variant.name for variant in one.variants), ", ".join(names))
    Console().print(found)


@app.command()
def run(
    names: Annotated[list[str], typer.Argument(metavar="WORKLOAD...", help="Which; `all` for every one")],
    peer: Annotated[list[str] | None, typer.Option(help="Only these peers, orderbus besides; may be repeated")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=100, help="How often each peer runs; the median counts (default: the workload's own)")
    ] = None,
    scale: Annotated[float, typer.Option(min=0.001, max=100, help="Messages a round, as a multiple of the workload's own")] = 1.0,
    json: JsonFile = RESULTS,
) -> None:
    """Measure, interleaved: each round runs every peer once. What can't be run is told, and the rest goes on (exit code 1)."""
    failed = False
    known = workloads()
    for name in known if names == ["all"] else names:
        workload = known.get(name)
        if workload is None:
            failed |= _complain(f"there is no workload {name!r}; there are {', '.join(known)}")
            continue
        chosen, complete = _peers(workload, peer)
        failed |= not complete
        if not chosen:
            continue
        try:
            failed |= not _measure(workload, chosen, rounds or workload.rounds, scale, json)
        except Missing as error:
            failed |= _complain(f"{name}: {error}")
    raise typer.Exit(int(failed))


@app.command()
def table(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKLOAD...]", help="Which; all that were measured, unless named")
    ] = None,
    json: JsonFile = RESULTS,
) -> None:
    """Print the results as Markdown tables."""
    print(tables.markdown(_read(json, names)))


@app.command()
def plot(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKLOAD...]", help="Which; all that were measured, unless named")
    ] = None,
    json: JsonFile = RESULTS,
    output: Annotated[Path, typer.Option(help="The SVG to write")] = Path("build/bench.svg"),
) -> None:
    """Draw the results as an SVG: a bar for each peer's messages a second, with the range of its rounds."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(plots.svg(_read(json, names)))
    console.print(f"written: {output}")


def _measure(workload: Workload, peers: list[str], rounds: int, scale: float, json: Path) -> bool:
    """Whether everybody came through, with nothing lost, doubled or left."""
    complaints: list[str] = []
    clean = True
    with ground(workload.servers) as place, console.status(workload.name) as status:

        def tell(text: str) -> None:
            if text.startswith("!"):
                complaints.append(text)
                console.print(text, style="red", markup=False)
            elif console.is_terminal:
                status.update(text)
            else:
                console.print(text)

        found: list[Result] = []
        for one in run_rounds(workload, peers, place, rounds=rounds, scale=scale, tell=tell):
            found.append(one)
            write(json, [one])
            if one.wrong:
                clean = False
                console.print(f"! {one.workload}, {one.variant}, {one.peer}: {one.wrong}", style="red", markup=False)
    print(tables.markdown(found))
    return clean and not complaints


def _peers(workload: Workload, asked: list[str] | None) -> tuple[list[str], bool]:
    """Whom to run, and whether that is everybody who was asked for."""
    complete = True
    for name in asked or ():
        if name not in workload.peers:
            complete = not _complain(f"{workload.name} has no peer {name!r}; it has {', '.join(workload.peers)}")
    chosen = []
    for name in workload.peers:
        if asked and name not in asked and name != workload.peers[0]:
            continue
        if _installed(name):
            chosen.append(name)
        else:
            missing = ", ".join(package for package in PEERS[name].packages if not _has(package))
            _complain(f"{workload.name}: {name} is left out: {missing} is not installed; `make bench-setup` installs the peers")
            complete = complete and not (asked and name in asked)
    return chosen, complete


def _installed(peer: str) -> bool:
    return all(_has(package) for package in PEERS[peer].packages)


def _has(package: str) -> bool:
    try:
        versions_of([package])
    except metadata.PackageNotFoundError:
        return False
    return True


def _read(path: Path, names: list[str] | None) -> list[Result]:
    if not path.exists():
        _complain(f"{path} is not there; `python -m bench run WORKLOAD --json {path}` makes it")
        raise typer.Exit(1)
    found = [one for one in read(path) if not names or one.workload in names]
    for name in names or ():
        if not any(one.workload == name for one in found):
            _complain(f"{path} has no results of {name!r}")
    if not found:
        raise typer.Exit(1)
    return found


def _complain(text: str) -> bool:
    console.print(f"bench: {text}", style="red", markup=False)
    return True
