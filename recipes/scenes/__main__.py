"""Command line: `python -m recipes.scenes --layout nyuv2 --output DIR --num-train 800 --num-val 200`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from recipes.common.command import at_least, exit_status, make_console, output_folder
from recipes.scenes.writers import write_celeba, write_cityscapes, write_nyuv2

__all__ = ["main"]

_WRITERS: dict[str, Any] = {"nyuv2": write_nyuv2, "cityscapes": write_cityscapes, "celeba": write_celeba}


def main(args: Sequence[str] | None = None) -> int:
    """Write one data set, as `args` or else `sys.argv` say, and return the exit status."""
    options = _parse(args)
    layout, folder = options.pop("layout"), options.pop("output")
    console = make_console(100)

    def write() -> None:
        _WRITERS[layout](folder, **options, console=console)
        console.print(f"{folder}: {layout}'s layout, drawn, not photographed.", highlight=False, soft_wrap=True)

    return exit_status(write, console, "Interrupted. What is written is kept: the same command goes on from there.")


def _parse(args: Sequence[str] | None) -> dict[str, Any]:
    about = "Draw rooms, streets or faces in a data set's layout."
    parser = argparse.ArgumentParser("python -m recipes.scenes", description=about, argument_default=argparse.SUPPRESS)
    parser.add_argument("--layout", choices=_WRITERS, required=True, help="data set whose layout to write")
    parser.add_argument("--output", type=output_folder, required=True, help="new or empty folder, or one to go on with")
    parser.add_argument("--num-train", type=at_least(1), required=True, help="training examples")
    parser.add_argument("--num-val", type=at_least(1), required=True, help="validation examples")
    parser.add_argument("--num-test", type=at_least(1), help="test examples (celeba only, needed there)")
    parser.add_argument("--height", type=at_least(16), help="rows (96; not for celeba)")
    parser.add_argument("--width", type=at_least(16), help="columns (128; cityscapes 192; not for celeba)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="decides every example (%(default)s)")
    parser.add_argument("--torchvision-layout", action="store_true", help="all below celeba/ (celeba only)")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="processes (%(default)s)")
    options = vars(parser.parse_args(args))
    layout = options["layout"]
    for name in ("height", "width") if layout == "celeba" else ("num_test", "torchvision_layout"):
        if name in options:
            parser.error(f"--{name.replace('_', '-')} does not apply to --layout {layout}")
    if layout == "celeba" and "num_test" not in options:
        parser.error("--layout celeba needs --num-test")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
