"""Command line of the recipe: `python -m recipes.digits fit --config recipes/digits/cost.yaml`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from recipes.digits.data import DigitsDataModule
from recipes.digits.model import DigitsModel

__all__ = ["DigitsCLI", "main"]


def _has_ink(tasks: Sequence[str]) -> bool:
    return "ink" in tasks


class DigitsCLI(LightningCLI):
    """LightningCLI in which the tasks of the model decide whether the data carry the ink target."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link `data.ink` to `model.tasks`."""
        parser.link_arguments("model.tasks", "data.ink", compute_fn=_has_ink)


def main(args: list[str] | None = None) -> DigitsCLI:
    """Run one subcommand.

    Args:
        args: Command line without the program's name; None: `sys.argv`.
    """
    # Threads gain nothing on tensors this small, and wait for each other when the machine has other work.
    torch.set_num_threads(1)
    return DigitsCLI(
        DigitsModel, DigitsDataModule, args=args, seed_everything_default=0, auto_configure_optimizers=False
    )


if __name__ == "__main__":
    main()
