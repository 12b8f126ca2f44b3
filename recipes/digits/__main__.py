"""Command line of the recipe: `python -m recipes.digits fit --config recipes/digits/cost.yaml`."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import LightningArgumentParser

from recipes.common.cli import RecipeCLI, exit_after
from recipes.digits.data import DigitsDataModule
from recipes.digits.model import DigitsModel

__all__ = ["DigitsCLI", "main"]


class DigitsCLI(RecipeCLI):
    """RecipeCLI that gives the tasks of the model to the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link `data.tasks` to `model.tasks`."""
        parser.link_arguments("model.tasks", "data.tasks")


def main(args: list[str] | None = None) -> DigitsCLI:
    """Run one subcommand."""
    # More threads do not help with tensors this small, and make each other wait on a busy machine.
    torch.set_num_threads(1)
    return DigitsCLI(DigitsModel, DigitsDataModule, args=args)


if __name__ == "__main__":
    exit_after(main)
