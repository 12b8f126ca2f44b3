"""Command line of the recipe: `python -m recipes.celeba fit --config recipes/celeba/fairgrad_cost.yaml`."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

from recipes.celeba import CelebADataModule, CelebAModel

__all__ = ["main"]


def main(args: list[str] | None = None) -> LightningCLI:
    """Run one subcommand; `args` without the program's name, by default `sys.argv`."""
    return LightningCLI(
        CelebAModel, CelebADataModule, args=args, seed_everything_default=0, auto_configure_optimizers=False
    )


if __name__ == "__main__":
    main()
