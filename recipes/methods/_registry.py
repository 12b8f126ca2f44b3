"""Methods by the names that tables show, made from their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer

__all__ = ["METHODS", "make_method", "method_settings"]

_FILES = {
    "LS": "ls",
    "SI": "si",
    "RLW": "rlw",
    "DWA": "dwa",
    "UW": "uw",
    "MGDA": "mgda",
    "GradDrop": "graddrop",
    "PCGrad": "pcgrad",
    "CAGrad": "cagrad",
    "IMTL-G": "imtl_g",
    "Nash-MTL": "nash_mtl",
    "FAMO": "famo",
    "FairGrad": "fairgrad",
    "UPGrad": "upgrad",
    "Aligned-MTL": "aligned_mtl",
}
METHODS: Mapping[str, Path] = {name: Path(__file__).with_name(f"{file}.yaml") for name, file in _FILES.items()}
"""Name to configuration, in the order of the paper's tables."""

# What TorchJD's classes call the number of tasks.
_NUM_TASKS_ARGUMENTS = ("n_tasks", "shape")


def make_method(name: str, num_tasks: int) -> Aggregator | Scalarizer | None:
    """A fresh method, as its configuration says.

    Args:
        name: One of `METHODS`.
        num_tasks: Number of tasks, for the methods that need to know it.

    Returns:
        What a model takes as its `mtl_method`; None for LS.

    Raises:
        ValueError: If there is no such method.
        ImportError: If the method needs a package that is not installed; the message says how to install it.
    """
    settings = method_settings(name, num_tasks)
    if settings is None:
        return None
    module, _, cls = settings["class_path"].rpartition(".")
    made = getattr(import_module(module), cls)(**settings["init_args"])
    assert isinstance(made, Aggregator | Scalarizer)
    return made


def method_settings(name: str, num_tasks: int) -> dict[str, Any] | None:
    """The class and the arguments of a method, as its configuration says; None for LS.

    Args:
        name: See `make_method`.
        num_tasks: See `make_method`.

    Raises:
        ValueError: If there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}. Take one of {', '.join(METHODS)}.")
    method = yaml.safe_load(METHODS[name].read_text(encoding="utf-8"))["model"]["mtl_method"]
    if method is None:
        return None
    arguments = method.get("init_args", {})
    arguments |= {argument: num_tasks for argument in _NUM_TASKS_ARGUMENTS if argument in arguments}
    return {"class_path": method["class_path"], "init_args": arguments}
