"""The command ``python -m lightning_noise``: a demonstration, and subcommands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

__all__ = ["SUBCOMMANDS", "main"]

SUBCOMMANDS = ("compare", "evaluate")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand, or the demonstration if there is none.

    Args:
        arguments: The arguments of the command. Default: those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next(iter(arguments), "--")
    if command in SUBCOMMANDS:
        _import(f"lightning_noise.cli.{command}", needed_by=command, extra="cli").main(arguments[1:])
    elif command.startswith("-"):
        _import("lightning_noise.demo.main", needed_by="the demonstration", extra="demo").main(arguments)
    else:
        _stop(f"expected {' or '.join(SUBCOMMANDS)}, or an option of the demonstration, got {command!r}", code=2)


def _import(module: str, *, needed_by: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        _stop(f'{needed_by} needs {error.name}: pip install "lightning_noise[{extra}]"')


def _stop(message: str, code: int = 1) -> NoReturn:
    print(f"lightning_noise: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
