"""The command line: `orderbus VERB`, or `python -m orderbus VERB`.

Exit codes, the same for every verb:

====  ==============================================================================
code  meaning
====  ==============================================================================
0     fine
1     findings, or something was left undone (`check`, `schema check`, `dlq`)
2     wrong use: an argument, a setting, a module or a bus that does not exist
3     `run` stopped, but not cleanly: work was cancelled and given back to the broker
4     a server is not available
====  ==============================================================================

What a program may want to read goes to stdout, and with `--json` nothing else does; logs, banners and errors go to stderr.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line with the arguments of the process, and exit."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.stderr.write(f"orderbus: the command line needs the package {error.name}: pip install 'orderbus[cli]'\n")
        raise SystemExit(2) from None
    from orderbus.cli.app import app

    app(prog_name="orderbus")
