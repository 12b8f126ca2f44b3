"""Command line of the recipe: `python -m recipes.nyuv2 fit --config CONFIG --data.root DIR`."""

from __future__ import annotations

from recipes.dense.command import DenseCLI, run_command
from recipes.nyuv2.data import NYUv2DataModule
from recipes.nyuv2.model import NYUv2Model

__all__ = ["main"]


def main(args: list[str] | None = None) -> DenseCLI:
    """Run one subcommand.

    Args:
        args: Command line without the program's name; None: `sys.argv`.
    """
    return run_command(NYUv2Model, NYUv2DataModule, args)


if __name__ == "__main__":
    main()
