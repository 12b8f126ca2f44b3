"""Command line of the recipe: `python -m recipes.celeba fit --config recipes/celeba/fairgrad_cost.yaml`."""

from __future__ import annotations

from recipes.celeba import CelebADataModule, CelebAModel
from recipes.common.cli import RecipeCLI, exit_after

__all__ = ["main"]


def main(args: list[str] | None = None) -> RecipeCLI:
    """Run one subcommand; `args` without the program's name, by default `sys.argv`."""
    return RecipeCLI(CelebAModel, CelebADataModule, args=args)


if __name__ == "__main__":
    exit_after(main)
