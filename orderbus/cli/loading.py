"""Finding a bus by `MODULE:BUS`, and the settings that it will run with."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback

import orderbus.errors
from orderbus._core.naming import nearest
from orderbus._core.settings import PREFIX, Settings
from orderbus._runtime.bus import Bus
from orderbus.errors import UsageError


def load_bus(target: str) -> Bus:
    """Import the module, the current directory included, and take the bus. Raises UsageError that names what is wrong."""
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise UsageError(f"{target!r} is not MODULE:BUS; write for example services.payment:bus", code="OB601")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _import(module_name)
    found = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise UsageError(
                f"module {module_name} has no {attribute!r}; {_buses_in(module, module_name, attribute)}", code="OB604"
            ) from None
    if not isinstance(found, Bus):
        raise UsageError(
            f"{target} is a {type(found).__name__}, not an orderbus.Bus; {_buses_in(module, module_name, attribute)}",
            code="OB604",
        )
    return found


def load_buses(targets: list[str]) -> list[Bus]:
    """Each bus once; UsageError where one is named twice or two share a group."""
    buses: list[Bus] = []
    for target in targets:
        bus = load_bus(target)
        if any(bus.group == other.group for other in buses):
            raise UsageError(f"{target}: the group {bus.group!r} is named twice; a process runs each group once", code="OB605")
        buses.append(bus)
    return buses


def settings_of(bus: Bus) -> Settings:
    """What the bus will run with: the environment, and over it what its own code gave."""
    return Settings.load(os.environ, bus._given)


def environment_settings() -> Settings:
    return Settings.load(os.environ)


def settings_without_broker() -> Settings:
    """The environment's settings, for commands that never speak to a broker."""
    return Settings.load({**os.environ, f"{PREFIX}BROKER_URL": os.environ.get(f"{PREFIX}BROKER_URL") or "memory://"})


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {error.name!r} in {os.getcwd()} or among the installed packages{_meant(error.name)}",
                code="OB602",
            ) from None
        raise UsageError(f"module {name} can't be imported: {_cause(error)}", code="OB603") from error
    except UsageError as error:
        raise UsageError(f"module {name} can't be imported: {error.text}{_line_in_program(error)}", code=error.code) from error
    except SystemExit as error:
        raise UsageError(
            f"module {name} can't be imported: it ends the process (sys.exit({error.code!r})); what runs only as a program belongs "
            'below `if __name__ == "__main__":`',
            code="OB603",
        ) from None
    except Exception as error:  # whatever the user's module raises is told with its place
        raise UsageError(f"module {name} can't be imported: {_cause(error)}", code="OB603") from error


def _meant(name: str) -> str:
    """A module beside the one that is missing, whose name is like its own."""
    parent, _, last = name.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", []) if parent else [os.getcwd()]
    near = nearest(last, [module.name for module in pkgutil.iter_modules(folders)])
    return "" if near is None else f"; did you mean {parent}{'.' if parent else ''}{near}?"


def _line_in_program(error: UsageError) -> str:
    """Where the program called what refused it; empty where the text says it already."""
    package = os.path.dirname(orderbus.errors.__file__) + os.sep
    called = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((package, "<frozen"))]
    place = f"{called[-1].filename}:{called[-1].lineno}" if called else ""
    return "" if not place or called[-1].filename in error.text else f" ({place})"


def _cause(error: Exception) -> str:
    """The error with the last place of the user's code that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}:{error.lineno})"
    elif len(frames) > 1:
        place = f" ({frames[-1].filename}:{frames[-1].lineno})"
    else:
        place = ""
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}{place}"


def _buses_in(module: object, module_name: str, wanted: str) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, Bus)]
    if not names:
        return "there is no Bus in that module"
    near = nearest(wanted, names)
    return f"did you mean {module_name}:{near}?" if near else f"there is {', '.join(f'{module_name}:{n}' for n in names)}"
