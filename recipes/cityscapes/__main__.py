"""Command line of the recipe: `python -m recipes.cityscapes fit --config CONFIG --data.root DIR`."""

from __future__ import annotations

from recipes.cityscapes.data import CityScapesDataModule
from recipes.cityscapes.model import CityScapesModel
from recipes.dense.command import DenseCLI, run_command

__all__ = ["main"]


def main(args: list[str] | None = None) -> DenseCLI:
    """Run one subcommand.

    Args:
        args: Command line without the program's name; None: `sys.argv`.
    """
    return run_command(CityScapesModel, CityScapesDataModule, args)


if __name__ == "__main__":
    main()
