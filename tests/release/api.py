"""`make api`: writes down every public name with its signature in docs/api.txt, so that no change of one goes unseen.

Public is what a module's `__all__` names, in `orderbus` and in every module beside it but those of INTERNAL and those that begin
with an underscore. Where a package names its public things itself, its modules are its own affair, its sub-packages are not.
What differs from the version before (docs/api-before.txt, set aside at the first `make api` under a new version) must be told in
CHANGELOG.md's first entry: tests/release/test_api.py says what is not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import orderbus
from tests.programs import ROOT

LISTING = ROOT / "docs" / "api.txt"
BEFORE = ROOT / "docs" / "api-before.txt"
INTERNAL = {"orderbus.__main__", "orderbus.abc", "orderbus.adapters", "orderbus.cli"}
"""Of the modules beside `orderbus`, those that are for itself: its protocols, what implements them, its command."""
SYNTAX = {"__aenter__", "__aiter__", "__call__", "__enter__", "__iter__", "__len__"}
"""The methods with two underscores that say how a thing may be used."""


def main() -> None:
    if LISTING.exists() and _version(LISTING) != orderbus.__version__:
        LISTING.replace(BEFORE)
    LISTING.write_text(listing())
    print(f"{LISTING.relative_to(ROOT)}: {len(LISTING.read_text().splitlines()) - 1} lines")
    for name in untold(LISTING, BEFORE, first_entry()):
        print(f"CHANGELOG.md's first entry does not mention {name}")


def listing() -> str:
    """The public API as it is, a name a line."""
    lines = [f"# orderbus {orderbus.__version__}: every public name, written by `make api`"]
    listed: dict[int, str] = {}
    for module in public_modules():
        for name in sorted(_names(module)):
            dotted, value = f"{module.__name__}.{name}", getattr(module, name)
            first = listed.setdefault(id(value), dotted)
            lines += _described(dotted, value) if first == dotted else [f"{dotted} = {first}"]
    return "\n".join(lines) + "\n"


def untold(now: Path, before: Path, told: str) -> list[str]:
    """The names that are new, gone or changed since the version before and that a text does not mention.

    Of a class that is new or gone as a whole, its own name is enough.
    """
    new, old = (set(path.read_text().splitlines()[1:]) if path.exists() else set() for path in (now, before))
    new_names, old_names = ({_dotted(line) for line in lines} for lines in (new, old))
    words = set(re.findall(r"\w+", told))
    changed = {_dotted(line) for line in new ^ old}
    whole = {name for name in changed if (name in new_names) != (name in old_names)}
    return sorted(name for name in changed if name.rpartition(".")[2] not in words and name.rpartition(".")[0] not in whole)


def first_entry() -> str:
    """The newest entry of the changelog, with its heading."""
    return "## " + (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]


def public_modules() -> Iterator[ModuleType]:
    yield orderbus
    for child in _children(orderbus):
        if child not in INTERNAL:
            yield from _public_in(child)


def _public_in(name: str) -> Iterator[ModuleType]:
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        yield module
    for child in _children(module):
        if not hasattr(module, "__all__") or hasattr(importlib.import_module(child), "__path__"):
            yield from _public_in(child)


def _children(module: ModuleType) -> Iterable[str]:
    found = pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}.")
    return sorted(info.name for info in found if not info.name.rpartition(".")[2].startswith("_"))


def _names(module: ModuleType) -> list[str]:
    assert isinstance(module.__all__, list)
    return module.__all__


def _described(dotted: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"{dotted}{_signature(value) if inspect.isroutine(value) else f' = {value}'}"
        return
    yield f"{dotted}{_made_by(value)}"
    own = [base for base in reversed(value.__mro__) if base.__module__.partition(".")[0] == "orderbus"]
    members: dict[str, str] = {}
    for base in own:
        members |= {name: text or members.get(name, "") for name, text in _members(base)}
    for name in sorted(members):
        yield f"{dotted}.{name}{members[name]}"


def _made_by(cls: type) -> str:
    """What its constructor takes."""
    if issubclass(cls, Enum) or getattr(cls, "_is_protocol", False):
        return ""
    fields = getattr(cls, "__struct_fields__", None)
    return _signature(cls) if fields is None or "__init__" in vars(cls) else f"({', '.join(fields)})"


def _members(cls: type) -> Iterator[tuple[str, str]]:
    """What can be used of a class, without what it inherits: methods with their signature, properties and fields with their type."""
    hints: dict[str, Any] = {**_attributes(cls), **inspect.get_annotations(cls)}
    for name in sorted({*hints, *vars(cls)}):
        if name.startswith("_") and name not in SYNTAX:
            continue
        member = vars(cls).get(name)
        function = getattr(member, "fget", None) or getattr(member, "func", None)  # of a property, and a cached one
        if function is not None:
            yield name, f": {_text(inspect.get_annotations(function).get('return', ''))}"
        elif isinstance(member, (staticmethod, classmethod)) or inspect.isfunction(member):
            yield name, _signature(getattr(cls, name))
        elif isinstance(member, Enum):
            yield name, f" = {member.value!r}"
        else:
            yield name, f": {_text(hints[name])}" if hints.get(name) else ""


def _attributes(cls: type) -> dict[str, str]:
    """What `__init__` sets, with the types that it gives."""
    made = vars(cls).get("__init__")
    if not inspect.isfunction(made) or made.__code__.co_filename.startswith("<"):  # a dataclass writes its own
        return {}
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(made)))):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                found[target.attr] = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
    return found


def _signature(value: Any) -> str:
    """As it is written: without the quotes that a string would have, without `self`, and with `async` where it is awaited."""
    try:
        signature = inspect.signature(value)
    except ValueError:  # an exception that takes what BaseException takes
        return "(*args)"
    parameters = [_as_written(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    returned = signature.return_annotation
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    text += " async" if inspect.iscoroutinefunction(value) else ""
    return text if returned is signature.empty or inspect.isclass(value) else f"{text} -> {_text(returned)}"


def _as_written(parameter: inspect.Parameter) -> inspect.Parameter:
    if parameter.annotation is not parameter.empty:
        parameter = parameter.replace(annotation=_Bare(_text(parameter.annotation)))
    if parameter.default is not parameter.empty:
        parameter = parameter.replace(default=_Bare(re.sub(r" at 0x[0-9a-f]+", "", repr(parameter.default))))
    return parameter


class _Bare(str):
    """Prints as itself."""

    def __repr__(self) -> str:
        return str(self)


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _dotted(line: str) -> str:
    return re.split(r"[(: ]", line, maxsplit=1)[0]


def _version(path: Path) -> str:
    return path.read_text().split(":", 1)[0].rpartition(" ")[2]


if __name__ == "__main__":
    main()
