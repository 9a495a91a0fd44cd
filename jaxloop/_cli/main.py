"""Parses a command line and runs its command.

    status = main(["inspect", "runs/digits"])

Each command is a module of this package with two functions: ``add_arguments(parser)`` and
``run(options) -> exit status``. A mistake of the user ends with one or two lines on standard error
and status 2, never with a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Any, NoReturn

from jaxloop import __version__
from jaxloop.errors import JaxloopError

COMMANDS = {
    "demo": "train on handwritten digits, and plot the curves",
    "inspect": "list the checkpoints of a run",
    "plot": "draw the curves of a run as a picture",
    "watch": "follow a run that another process trains",
    "verify": "check every array of every checkpoint",
    "diff": "find out where two runs differ",
    "env": "print versions and devices, for a bug report",
}
"""The commands and what they do. Each is the module of the same name."""

_ON_DEVICES = ("demo", "env")
"""The commands that need the devices. The others leave them to the run that uses them."""

_STATUSES = """\
exit status:
  0  success
  1  verify: something is damaged; diff: the runs differ
  2  an error, such as a wrong argument or a folder that does not exist
  130  interrupted with Ctrl-C
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take two lines."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and ends the command."""
        self.exit(2, f"{self.prog}: {message}\n  fix: see `{self.prog} --help`\n")


def main(arguments: list[str], prog: str = "jaxloop") -> int:
    """Runs a command.

    Args:
        arguments: The command and its arguments. Without a command, it is ``demo``.
        prog: The name of the program, for its messages.

    Returns:
        The exit status: 0 for success, 1 if what was compared differs or is damaged, 2 for an
        error, 130 after Ctrl-C.

    Example:
        >>> main(["--version"]) == 0
        jaxloop ...
        True
    """
    first = arguments[0] if arguments else ""
    if not first or (first.startswith("-") and first not in ("-h", "--help", "--version")):
        arguments = ["demo", *arguments]
    chosen = next((one for one in arguments if not one.startswith("-")), "")
    if chosen not in _ON_DEVICES and "jax" not in sys.modules:
        # The run that writes the folder may need all the memory of the devices.
        os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        options = _parse(arguments, prog, chosen)
    except SystemExit as ending:  # argparse has printed the help or the error
        return ending.code if isinstance(ending.code, int) else 2
    try:
        status: int = _module(options.command).run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _forget_output()
        return 0
    except (JaxloopError, OSError) as error:
        print(f"{prog} {options.command}: {error}", file=sys.stderr)
        return 2


def script() -> int:
    """Runs the command that the process was started with. Without one, it prints the help."""
    return main(sys.argv[1:] or ["--help"])


def _parse(arguments: list[str], prog: str, chosen: str) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog=prog,
        description="Tools for the runs of jaxloop.",
        epilog=f"`{prog} COMMAND --help` shows examples.\n\n{_STATUSES}",
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"jaxloop {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=raw)
        if name == chosen:  # the other modules are not imported
            module = _module(name)
            synopsis, _, rest = (module.__doc__ or "").partition("\n\n")
            command.description = synopsis
            command.epilog = rest
            module.add_arguments(command)
    return parser.parse_args(arguments)


def _module(command: str) -> Any:
    return importlib.import_module(f"jaxloop._cli.{command}")


def _forget_output() -> None:
    """Keeps Python from reporting, when it exits, that nobody reads the output any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
