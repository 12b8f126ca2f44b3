"""What the command lines of the recipes share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from recipes.common.parallel import RunFailedError

__all__ = ["at_least", "exit_status", "make_console", "print_files"]


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    return integer


def make_console(width: int) -> Console:
    """The terminal, or a console of some width where there is none to ask for it."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def exit_status(command: Callable[[], None], console: Console, interrupted: str) -> int:
    """Run a command, and say in one line what the user can mend; anything else is a traceback.

    Args:
        command: What to run.
        console: Where to say it.
        interrupted: What to say after Ctrl-C.

    Returns:
        0; 1 after an error; 130 after Ctrl-C.
    """
    try:
        command()
    except (ImportError, OSError, RunFailedError, ValueError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print(interrupted)
        return 130
    return 0


def print_files(console: Console, files: Iterable[tuple[str, Path | str]]) -> None:
    """One line a file: where it is, and what it holds."""
    for what, path in files:
        console.print(f"{path}  {what}", highlight=False, markup=False, soft_wrap=True)
