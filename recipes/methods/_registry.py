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

_NAMES = (
    *("LS", "SI", "RLW", "DWA", "UW", "MGDA", "GradDrop", "PCGrad", "CAGrad", "IMTL-G", "Nash-MTL", "FAMO"),
    *("FairGrad", "UPGrad", "Aligned-MTL"),
)
METHODS: Mapping[str, Path] = {
    name: Path(__file__).with_name(f"{name.lower().replace('-', '_')}.yaml") for name in _NAMES
}
"""Name to configuration, in the order of the paper's tables."""


def make_method(name: str, num_tasks: int) -> Aggregator | Scalarizer | None:
    """Make a fresh method from its configuration.

    Args:
        name: One of `METHODS`.
        num_tasks: Number of tasks, for the methods that need it.

    Returns:
        The `mtl_method` of a model; None for LS.

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
    """The class and the arguments of a method; None for LS. See `make_method`."""
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}. Take one of {', '.join(METHODS)}.")
    method = yaml.safe_load(METHODS[name].read_text(encoding="utf-8"))["model"]["mtl_method"]
    if method is None:
        return None
    arguments = method.get("init_args", {})
    # TorchJD's classes call the number of tasks by one of these names.
    arguments |= {argument: num_tasks for argument in ("n_tasks", "shape") if argument in arguments}
    return {"class_path": method["class_path"], "init_args": arguments}
