"""Command line of the recipe: `python -m recipes.qm9 fit --config recipes/qm9/fairgrad_cost.yaml`."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from recipes.common.cli import RecipeCLI, exit_after
from recipes.qm9.data import QM9DataModule
from recipes.qm9.model import QM9Model

__all__ = ["QM9CLI", "main"]


class QM9CLI(RecipeCLI):
    """RecipeCLI that gives `model.targets` to the data module too."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link `data.targets` to `model.targets`."""
        parser.link_arguments("model.targets", "data.targets")


def main(args: list[str] | None = None) -> QM9CLI:
    """Run one subcommand; `args` without the program's name, by default `sys.argv`."""
    return QM9CLI(QM9Model, QM9DataModule, args=args)


if __name__ == "__main__":
    exit_after(main)
