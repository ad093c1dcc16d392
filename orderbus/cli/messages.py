"""`orderbus messages`: would the messages that are under way, or in an archive, still be read after this change?

A verb of its own: `orderbus check` looks at servers and takes buses as its arguments, this one looks at files and needs no server.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.text import Text

from orderbus._core.event import Event, event_type
from orderbus._core.samples import SampleFile, difference, missing_fields, samples_of, unread_fields
from orderbus._runtime.bus import Bus
from orderbus.cli.exits import ExitCode, clear_errors
from orderbus.cli.loading import load_buses
from orderbus.cli.output import console, plain, print_json
from orderbus.errors import UsageError

app = typer.Typer(
    no_args_is_help=True, help="Samples of messages, kept with the code: a change that old messages would not survive is found."
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where the samples are, a file for each topic and version.")]
Targets = Annotated[list[str], typer.Argument(metavar="MODULE:BUS...", help="The buses whose events these are.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each thing looked at.")]


class Looked(msgspec.Struct, frozen=True):
    """What was found of one file, or of one event class."""

    what: str
    status: Literal["ok", "written", "finding"]
    text: str


@app.command("check", epilog="Example: orderbus messages check tests/messages services.payment:bus")
@clear_errors
def check(folder: Folder, targets: Targets, as_json: AsJson = False) -> None:
    """Read every sample with today's event classes.

    Found are a message that would be parked now, with its field; a field of old messages that would be ignored; another key; a topic that no
    class has any more; and events and fields of which there is no sample yet.

    Exit code 0: fine, 1: findings, 2: wrong use.
    """
    kinds = event_classes(targets)
    files = _files(folder)
    looked = [one for path, file in files.items() for one in _old(path, file, kinds)]
    looked += [one for kind in kinds for one in _unsampled(kind, files)]
    _print(looked, as_json)
    if any(one.status == "finding" for one in looked):
        raise typer.Exit(ExitCode.FINDINGS)


@app.command("write", epilog="Example: orderbus messages write tests/messages services.payment:bus && git add tests/messages")
@clear_errors
def write(folder: Folder, targets: Targets, as_json: AsJson = False) -> None:
    """Add samples of today's event classes. What is there stays as it is: these are the messages of the past.

    Where no sample can be made up, for a field with a pattern for example, it says so: write one by hand into the file, or copy a real message.

    Exit code 0: fine, 1: some could not be made, 2: wrong use.
    """
    kinds = event_classes(targets)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _files(folder)
        looked = [_added(kind, folder, files) for kind in _senders(kinds)]
    except OSError as error:
        raise UsageError(f"the samples can't be written: {error}", code="OB612") from error
    _print(looked, as_json)
    if any(one.status == "finding" for one in looked):
        raise typer.Exit(ExitCode.FINDINGS)


def event_classes(targets: Sequence[str]) -> list[type[Event]]:
    """The events that the buses' handlers take and return, and those that their modules name; by topic and version."""
    found: dict[type[Event], None] = {}
    for target, bus in zip(targets, load_buses(list(targets)), strict=True):
        for kind in _named(bus, target.partition(":")[0]):
            found[kind] = None
    return sorted(found, key=lambda kind: (event_type(kind).topic, event_type(kind).version, kind.__qualname__))


def _named(bus: Bus, module: str) -> Iterator[type[Event]]:
    for handler, plan in bus.plans():
        yield from handler.events
        yield from (kind for kind in plan.emits if hasattr(kind, "__event_type__"))
    modules = {module, *(handler.function.__module__ for handler in bus.handlers)}
    for name in sorted(modules):
        for value in vars(sys.modules[name]).values():
            if isinstance(value, type) and issubclass(value, Event) and hasattr(value, "__event_type__"):
                yield value


def _senders(kinds: Sequence[type[Event]]) -> list[type[Event]]:
    """Of two services' classes for one event, the one with more fields: a reader leaves out what it has no use for."""
    by_event: dict[tuple[str, int], type[Event]] = {}
    for kind in kinds:
        event = event_type(kind).topic, event_type(kind).version
        by_event[event] = max(by_event.get(event, kind), kind, key=lambda one: len(one.__struct_fields__))
    return list(by_event.values())


def _files(folder: Path) -> dict[Path, SampleFile]:
    if not folder.is_dir():
        text = f"there is no folder {folder}; make the samples with `orderbus messages write {folder} MODULE:BUS`"
        raise UsageError(text, code="OB619")
    files = {}
    for path in sorted(folder.glob("*.json")):
        try:
            files[path] = msgspec.json.decode(path.read_bytes(), type=SampleFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"{path}: is no file of samples: {error}", code="OB619") from error
    return files


def _old(path: Path, file: SampleFile, kinds: Sequence[type[Event]]) -> Iterator[Looked]:
    """The samples of a file, read by each class that has their topic."""
    readers = [kind for kind in kinds if event_type(kind).topic == file.topic]
    if not readers:
        text = f"no event class of these buses has the topic {file.topic!r}: keep one until no message is under way, then delete the file"
        yield Looked(str(path), "finding", text)
        return
    wrong: dict[str, int] = {}
    for number, sample in enumerate(file.samples, 1):
        for kind in readers:
            if (what := difference(kind, sample)) is not None:
                wrong.setdefault(what, number)
        # Of two services' classes for one topic, either may leave out what the other reads.
        for field in sorted(frozenset.intersection(*(unread_fields(kind, sample) for kind in readers))):
            wrong.setdefault(f"`{field}` of old messages would be ignored: {readers[0].__name__} has no such field", number)
    for what, number in wrong.items():
        yield Looked(f"{path}, sample {number}", "finding", f"{what}. {_ADVICE}")
    if not wrong:
        names = ", ".join(dict.fromkeys(kind.__name__ for kind in readers))
        yield Looked(str(path), "ok", f"{_count(len(file.samples))} can be read as {names}")


_ADVICE = (
    "Give a new field a default, rename by `msgspec.field(name=…)`; where it is meant, and none is under way, delete the sample"
)


def _unsampled(kind: type[Event], files: dict[Path, SampleFile]) -> Iterator[Looked]:
    declared = event_type(kind)
    samples = [
        one for file in files.values() if (file.topic, file.version) == (declared.topic, declared.version) for one in file.samples
    ]
    missing = missing_fields(kind, samples)
    if not samples:
        yield Looked(_name(kind), "finding", "there is no sample of it; `orderbus messages write` makes some")
    elif missing:
        yield Looked(
            _name(kind),
            "finding",
            f"no sample has {', '.join(f'`{name}`' for name in missing)}; `orderbus messages write` adds some",
        )


def _added(kind: type[Event], folder: Path, files: dict[Path, SampleFile]) -> Looked:
    declared = event_type(kind)
    path = folder / f"{declared.topic}.v{declared.version}.json"
    file = files.setdefault(path, SampleFile(declared.topic, declared.version, []))
    try:
        made = samples_of(kind)
    except UsageError as error:
        return Looked(
            _name(kind), "finding" if missing_fields(kind, file.samples) else "ok", f"{error.text}; write one by hand into {path}"
        )
    known = [msgspec.json.decode(sample.body) for sample in file.samples]
    new = [sample for sample in made if msgspec.json.decode(sample.body) not in known]
    file.samples += new
    if new:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
    return Looked(
        _name(kind), "written" if new else "ok", f"{_count(len(new))} added to {path}" if new else f"nothing new for {path}"
    )


def _count(samples: int) -> str:
    return "1 sample" if samples == 1 else f"{samples} samples"


def _name(kind: type[Event]) -> str:
    return f"{kind.__name__} ({event_type(kind).topic} v{event_type(kind).version})"


_STYLES = {"ok": "green", "written": "cyan", "finding": "red"}


def _print(looked: Sequence[Looked], as_json: bool) -> None:
    for one in looked:
        if as_json:
            print_json(one)
        else:
            sign = one.status.upper() if one.status == "finding" else one.status
            console().print(Text.assemble((f"{sign:<8}", _STYLES[one.status]), (f"{one.what}: ", "bold"), plain(one.text)))
