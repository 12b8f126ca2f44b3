"""Command line: `python -m recipes.scenes --layout nyuv2 --output DIR --num-train 800 --num-val 200`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from recipes.common.command import at_least, exit_status, make_console
from recipes.scenes.writers import write_celeba, write_cityscapes, write_nyuv2

__all__ = ["main"]

_WIDTH = 100
_SCENES = {"nyuv2": write_nyuv2, "cityscapes": write_cityscapes}
_ONLY_CELEBA = ("num_test", "torchvision_layout")
_NEVER_CELEBA = ("height", "width")


def main(args: Sequence[str] | None = None) -> int:
    """Write one data set.

    Args:
        args: Command line without the program's name; None: `sys.argv`.

    Returns:
        The exit status.
    """
    options = vars(_parse(args))
    layout, folder = options.pop("layout"), options.pop("output")
    console = make_console(_WIDTH)
    given = {name: value for name, value in options.items() if value is not None}

    def write() -> None:
        (write_celeba if layout == "celeba" else _SCENES[layout])(folder, **given, console=console)
        console.print(f"{folder}: {layout}'s layout, drawn, not photographed.", highlight=False, soft_wrap=True)

    return exit_status(write, console, "Interrupted. What is written is kept: the same command goes on from there.")


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m recipes.scenes", description="Draw rooms, streets or faces in a data set's layout."
    )
    parser.add_argument("--layout", choices=[*_SCENES, "celeba"], required=True, help="data set whose layout to write")
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder, or one to go on with")
    parser.add_argument("--num-train", type=at_least(1), required=True, help="training examples")
    parser.add_argument("--num-val", type=at_least(1), required=True, help="validation examples")
    parser.add_argument("--num-test", type=at_least(1), help="test examples (celeba only, needed there)")
    parser.add_argument("--height", type=at_least(16), help="rows (96; not for celeba)")
    parser.add_argument("--width", type=at_least(16), help="columns (128; cityscapes 192; not for celeba)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="decides every example (%(default)s)")
    parser.add_argument(
        "--torchvision-layout", action="store_true", default=None, help="all below celeba/ (celeba only)"
    )
    parser.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count() or 1, help="processes; the files are the same (%(default)s)"
    )
    options = parser.parse_args(args)
    is_celeba = options.layout == "celeba"
    for name in _NEVER_CELEBA if is_celeba else _ONLY_CELEBA:
        if getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not apply to --layout {options.layout}")
    if is_celeba and options.num_test is None:
        parser.error("--layout celeba needs --num-test")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
