"""What the command lines of all recipes share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

__all__ = ["Provenance", "RecipeCLI", "exit_after"]

_TRACEBACK = "RECIPES_TRACEBACK"
_TELEPORT = "SymmetryTeleportCallback"


class Provenance(Callback):
    """Writes into a checkpoint which model it is of."""

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = type(pl_module).__name__


class RecipeCLI(LightningCLI):
    """LightningCLI for a recipe.

    - A checkpoint of another recipe, a damaged one, and options of the model that contradict it are refused by name.
    - Only `fit` writes a log. The others print their results, and draw into the folder of the checkpoint's run.
    - The log gets a folder that is named after the layers of the configuration: `digits/ls` becomes
      `digits/cagrad_cost` with the layers `cagrad.yaml` and `with_cost.yaml`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,
            "trainer_defaults": {"callbacks": [Provenance()]},
        }
        super().__init__(*args, **{**defaults, **kwargs})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path and path not in ("best", "last", "hpc"):
            checkpoint = _load(Path(path), self._model_class.__name__)
            _check_options(sys.argv[1:] if args is None else args, self.config[subcommand].model, checkpoint, path)

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if self.subcommand is None:
            return
        trainer = self.config[self.subcommand].trainer
        if self.subcommand != "fit":
            trainer.logger, self.save_config_callback = False, None
            path = self.config[self.subcommand].get("ckpt_path")
            if path and trainer.default_root_dir is None and Path(path).is_file():
                # What callbacks draw goes into the folder of the run.
                folder = Path(path).resolve().parent
                trainer.default_root_dir = str(folder.parent if folder.name == "checkpoints" else folder)
        else:
            teleports = any(_TELEPORT in str(callback.get("class_path")) for callback in trainer.callbacks or [])
            layers = [Path(str(path)) for path in self.config[self.subcommand].get("config") or []]
            for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
                options = getattr(logger, "init_args", None)
                if options is not None and options.get("name"):
                    options.name = _log_name(options.name, layers, teleports)


def exit_after(main: Callable[[], object]) -> None:
    """Run a command line, and print errors that the user can fix without a traceback."""
    if not sys.stdout.isatty():
        # Lightning cuts the headers of its tables to 80 columns there.
        os.environ.setdefault("COLUMNS", "240")
    try:
        main()
    except (ImportError, MisconfigurationException, OSError, TypeError, ValueError) as error:
        if os.environ.get(_TRACEBACK):
            raise
        print(f"{type(error).__name__}: {error}\n(Set {_TRACEBACK}=1 for the traceback.)", file=sys.stderr)
        raise SystemExit(1) from None


def _log_name(name: str, layers: Sequence[Path], teleports: bool) -> str:
    """The folder of a log, whose last part follows the layers from `recipes/methods`."""
    parent, slash, last = name.rpartition("/")
    of_methods = [layer.stem for layer in layers if layer.parent.name == "methods"]
    last = next((stem for stem in reversed(of_methods) if not stem.startswith("with_")), last)
    if teleports and "cost" not in last and not last.endswith("paper"):
        last += next((stem.removeprefix("with") for stem in of_methods if stem.startswith("with_")), "_cost")
    return parent + slash + last


def _load(path: Path, model: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`--ckpt_path` {path} does not exist. Give the path of a .ckpt file.")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"`--ckpt_path` {path} cannot be read as a checkpoint ({error}). It may be damaged or something else: use"
            " another one."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(
            f"`--ckpt_path` {path} is no checkpoint of Lightning: it has no `state_dict`. Use another one."
        )
    if checkpoint.get("recipe", model) != model:
        raise ValueError(
            f"`--ckpt_path` {path} is a checkpoint of {checkpoint['recipe']}, but this recipe trains {model}. Use a"
            " checkpoint of this recipe."
        )
    return checkpoint


def _check_options(args: ArgsType, model: Any, checkpoint: dict[str, Any], path: str) -> None:
    """Refuse options of the model that the hyperparameters of a checkpoint would overrule."""
    saved = checkpoint.get("hyper_parameters", {})
    for argument in args if isinstance(args, Sequence) else ():
        name = str(argument).split("=")[0].removeprefix("--model.")
        if str(argument).startswith("--model.") and name in saved and model.get(name) != saved[name]:
            raise ValueError(
                f"`--model.{name}={model.get(name)}` contradicts `--ckpt_path` {path}, whose model has"
                f" {name}={saved[name]}, and would be ignored. Remove one of the two."
            )
