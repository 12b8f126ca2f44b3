"""One training of a table: its configuration, its folder and its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from recipes.common.files import replacing
from recipes.common.parallel import RunFailedError
from recipes.methods import METHODS
from recipes.tables.benchmarks import BENCHMARKS

__all__ = ["COSTS", "METHOD_LAYERS", "Run", "result_of", "train"]

_RECIPES = Path(__file__).parents[1]
_LAYERS = _RECIPES / "methods"

METHOD_LAYERS: Mapping[str, Path] = {
    **METHODS,
    # As the paper has them.
    "FairGrad": _LAYERS / "fairgrad_public.yaml",
    "FairGrad (TorchJD)": _LAYERS / "fairgrad.yaml",
    "IMTL": _LAYERS / "imtl.yaml",
}
"""Method to its configuration."""

COSTS: Mapping[str, Path | None] = {
    "none": None,
    "paper": _LAYERS / "with_paper_cost.yaml",
    "default": _LAYERS / "with_cost.yaml",
    "deferred": _LAYERS / "with_deferred_cost.yaml",
}
"""Settings of COST to their configuration."""

_LOG_TAIL = 30


@dataclass(frozen=True)
class Run:
    """A method, with COST or without, on a benchmark, from a seed.

    Attributes:
        benchmark: A key of `BENCHMARKS`.
        method: A key of `METHOD_LAYERS`.
        cost: A key of `COSTS`.
        seed: Seed of everything, the order of the batches included.
        output: Folder of all runs.
        data: Folder of the data; None where a benchmark needs none.
        epochs: Number of epochs; None: those of the protocol.
        settings: Options of the recipe's command line, such as `data.batch_size`, to their values.
    """

    benchmark: str
    method: str
    cost: str
    seed: int
    output: Path
    data: Path | None = None
    epochs: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its row in the table."""
        return self.method + {"none": "", "paper": " + COST"}.get(self.cost, f" + COST, {self.cost}")

    @property
    def name(self) -> str:
        """Its folder below `output`."""
        method = METHOD_LAYERS[self.method].stem
        return f"{self.benchmark}/{method}{'' if self.cost == 'none' else f'_cost_{self.cost}'}/seed_{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.output / self.name

    def configuration(self) -> dict[str, Any]:
        """What comes on top of the configuration of the benchmark."""
        benchmark, method = BENCHMARKS[self.benchmark], _loaded(METHOD_LAYERS[self.method])
        epochs = benchmark.epochs if self.epochs is None else self.epochs
        callbacks = _callbacks(method) + _callbacks(_loaded(COSTS[self.cost]))
        for arguments in (callback["init_args"] for callback in callbacks if "init_args" in callback):
            if self.cost == "paper" and "start_epoch" in arguments:
                arguments["start_epoch"] = round(epochs / 4)
            if "num_tasks" in arguments:
                arguments["num_tasks"] = benchmark.num_tasks
        if not benchmark.last_epochs:
            path = str(self.folder.resolve() / "test.json")
            callbacks.append({"class_path": "recipes.tables.record.TestRecord", "init_args": {"path": path}})
        # An empty name and version: an attempt that goes on with a run writes where the one before did.
        init_args = {"save_dir": str(self.folder.resolve()), "name": "", "version": "", "default_hp_metric": False}
        logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": init_args}
        of_method = method["model"]["mtl_method"] or {}
        for name in {"n_tasks", "shape"} & set(of_method.get("init_args", {})):
            of_method["init_args"][name] = benchmark.num_tasks
        made: dict[str, Any] = {
            "seed_everything": self.seed,
            "model": method["model"],
            "data": {"seed" if benchmark.last_epochs else "shuffle_seed": self.seed},
            "trainer": {"max_epochs": epochs, "logger": logger, "callbacks+": callbacks},
        }
        if self.data is not None:
            made["data"]["root"] = str(self.data.resolve())
        for key, value in self.settings.items():
            _put(made, key, value)
        return made

    def command(self, subcommand: str, checkpoint: str | None) -> list[str]:
        """The command line of the recipe."""
        configs = ["--config", str(_RECIPES / self.benchmark / "ls.yaml"), "--config", str(self.folder / "run.yaml")]
        resume = [] if checkpoint is None else ["--ckpt_path", str(self.folder / "checkpoints" / checkpoint)]
        return [sys.executable, "-m", f"recipes.{self.benchmark}", subcommand, *configs, *resume]


def result_of(run: Run) -> dict[str, float] | None:
    """Metric to its value, if the run is complete.

    Raises:
        ValueError: If its folder has a run with other settings, or a file that cannot be read.
    """
    made = run.folder / "run.yaml"
    if made.is_file() and _read(made, yaml.safe_load) != run.configuration():
        raise ValueError(
            f"{made} is of a run with other settings. Give another `--output`, the settings of that run, or delete"
            f" {run.folder}."
        )
    path = run.folder / ("last_10.json" if BENCHMARKS[run.benchmark].last_epochs else "test.json")
    means: dict[str, float] | None = _read(path, _means) if path.is_file() else None
    return means


def train(run: Run, device: int | None = None) -> dict[str, float]:
    """Train from the last checkpoint, if there is one, and test.

    Args:
        run: The run. What it prints goes to `log.txt` in its folder.
        device: The GPU to take; None: whatever the Trainer takes.

    Returns:
        Metric to its value.

    Raises:
        RunFailedError: If a command fails. The message ends with what it printed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(run.configuration(), sort_keys=False)
    with replacing(run.folder / "run.yaml") as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    # Lightning refuses to overwrite it, although it says the same.
    (run.folder / "config.yaml").unlink(missing_ok=True)
    last = "last.ckpt" if (run.folder / "checkpoints" / "last.ckpt").is_file() else None
    _call(run, run.command("fit", last), device)
    if not BENCHMARKS[run.benchmark].last_epochs:
        _call(run, run.command("test", "best.ckpt"), device)
    result = result_of(run)
    if result is None:
        raise RunFailedError(f"The run {run.name!r} ended without a result; it was interrupted. See {_log(run)}.")
    return result


def _call(run: Run, command: list[str], device: int | None) -> None:
    environment = dict(os.environ) if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
    with _log(run).open("a", encoding="utf-8") as log:
        status = _status(command, log, environment)
    if status:
        tail = "\n".join(_log(run).read_text(encoding="utf-8").splitlines()[-_LOG_TAIL:])
        raise RunFailedError(f"The run {run.name!r} failed. The end of {_log(run)}:\n{tail}")


def _status(command: list[str], log: IO[str], environment: Mapping[str, str]) -> int:
    done = subprocess.run(command, check=False, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
    return done.returncode


def _log(run: Run) -> Path:
    return run.folder / "log.txt"


def _loaded(layer: Path | None) -> dict[str, Any]:
    return {} if layer is None else yaml.safe_load(layer.read_text(encoding="utf-8"))


def _callbacks(layer: Mapping[str, Any]) -> list[dict[str, Any]]:
    callbacks: list[dict[str, Any]] = layer.get("trainer", {}).get("callbacks+", [])
    return callbacks


def _means(text: str) -> dict[str, float]:
    return {str(metric): float(value) for metric, value in json.loads(text)["means"].items()}


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}. Delete it, and the same command makes it anew.") from error


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"`--set` cannot set {path!r}: {parent!r} holds {tree!r}, which has no options.")
    tree[name] = value
