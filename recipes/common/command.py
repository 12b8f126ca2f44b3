"""What the command lines of the recipes share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rich.console import Console

__all__ = ["at_least", "make_console", "print_error"]


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


def print_error(console: Console, error: Exception) -> None:
    """Print what went wrong, letter by letter as it says."""
    console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
