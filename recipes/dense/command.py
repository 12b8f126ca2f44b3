"""The command line of dense benchmarks."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from recipes.common.cli import RecipeCLI
from recipes.dense.data import DenseDataModule
from recipes.dense.model import DenseModel

__all__ = ["DenseCLI", "run_command"]


class DenseCLI(RecipeCLI):
    """RecipeCLI that gives `model.tasks` to the data module too."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link `data.tasks` to `model.tasks`."""
        parser.link_arguments("model.tasks", "data.tasks")


def run_command(model: type[DenseModel], data: type[DenseDataModule], args: list[str] | None = None) -> DenseCLI:
    """Run one subcommand of a benchmark; `args` without the program's name, by default `sys.argv`."""
    return DenseCLI(model, data, args=args)
