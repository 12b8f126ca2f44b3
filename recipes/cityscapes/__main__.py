"""Command line of the recipe: `python -m recipes.cityscapes fit --config CONFIG --data.root DIR`."""

from functools import partial

from recipes.cityscapes import CityScapesDataModule, CityScapesModel
from recipes.common.cli import exit_after
from recipes.dense.command import run_command

__all__ = ["main"]

main = partial(run_command, CityScapesModel, CityScapesDataModule)

if __name__ == "__main__":
    exit_after(main)
