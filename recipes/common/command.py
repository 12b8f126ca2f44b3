"""Shared parts of the command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from recipes.common.parallel import RunFailedError

__all__ = ["add_run_options", "at_least", "exit_status", "make_console", "output_folder", "print_files"]

_WIDE = 240


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    return integer


def output_folder(text: str) -> Path:
    """An argparse type: a folder to write to, which may not exist yet."""
    path = Path(text)
    blocking = next((part for part in (path, *path.parents) if part.exists()), None)
    if blocking is not None and not blocking.is_dir():
        raise argparse.ArgumentTypeError(f"{blocking} is a file; give a folder")
    return path


def add_run_options(parser: argparse.ArgumentParser, *, seeds: int, epochs: str, output: str, jobs: int) -> None:
    """Add `--seeds`, `--epochs`, `--output` and `--jobs` with these defaults."""
    parser.add_argument("--seeds", type=at_least(1), default=seeds, help="number of seeds; default: %(default)s")
    parser.add_argument("--epochs", type=at_least(1), help=f"number of epochs; default: {epochs}")
    parser.add_argument("--output", type=output_folder, default=Path(output), help="folder; default: %(default)s")
    parser.add_argument("--jobs", type=at_least(1), default=jobs, help="runs at a time; default: %(default)s")


def make_console(width: int) -> Console:
    """The terminal. If the output goes elsewhere, a console of the given width or more: no header is cut there."""
    console = Console()
    return console if console.is_terminal else Console(width=max(width, _WIDE))


def exit_status(command: Callable[[], None], console: Console, interrupted: str) -> int:
    """Run a command, and print errors that the user can fix without a traceback.

    Returns:
        0; 1 after an error; 130 after Ctrl-C, with the message `interrupted`.
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


def print_files(console: Console, files: Iterable[tuple[str, Path]]) -> None:
    """Print one line per file: its path, and what it holds."""
    for what, path in files:
        console.print(f"{path}  {what}", highlight=False, markup=False, soft_wrap=True)
