"""Command line of the recipe: `python -m recipes.celeba fit --config recipes/celeba/fairgrad_cost.yaml`."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

from recipes.celeba.data import CelebADataModule
from recipes.celeba.model import CelebAModel

__all__ = ["main"]


def main(args: list[str] | None = None) -> LightningCLI:
    """Run one subcommand.

    Args:
        args: Command line without the program's name; None: `sys.argv`.
    """
    return LightningCLI(
        CelebAModel, CelebADataModule, args=args, seed_everything_default=0, auto_configure_optimizers=False
    )


if __name__ == "__main__":
    main()
