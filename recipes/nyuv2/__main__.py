"""Command line of the recipe: `python -m recipes.nyuv2 fit --config CONFIG --data.root DIR`."""

from functools import partial

from recipes.common.cli import exit_after
from recipes.dense.command import run_command
from recipes.nyuv2 import NYUv2DataModule, NYUv2Model

__all__ = ["main"]

main = partial(run_command, NYUv2Model, NYUv2DataModule)

if __name__ == "__main__":
    exit_after(main)
