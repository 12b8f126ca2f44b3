"""The targets of QM9, in the order and the units of torch_geometric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BENCHMARK", "TARGETS", "Target", "chosen_targets"]


@dataclass(frozen=True)
class Target:
    """One property of a molecule.

    Attributes:
        unit: Unit of the data.
        report_unit: Unit in which errors are reported.
        report_factor: Factor from `unit` to `report_unit`.
        single_task_mae: Mean absolute error, in `report_unit`, of a network trained on this target alone: the value
            that published Δm% are relative to. None: the benchmark has no such target.
    """

    unit: str
    report_unit: str
    report_factor: float
    single_task_mae: float | None = None


def _energy(single_task_mae: float | None = None) -> Target:
    return Target("eV", "meV", 1000.0, single_task_mae)


def _other(unit: str, single_task_mae: float | None = None) -> Target:
    return Target(unit, unit, 1.0, single_task_mae)


TARGETS: dict[str, Target] = {
    "mu": _other("D", 0.0671),
    "alpha": _other("a0^3", 0.1814),
    "homo": _energy(60.576),
    "lumo": _energy(53.915),
    "gap": _energy(),
    "r2": _other("a0^2", 0.5027),
    "zpve": _energy(4.539),
    "U0": _energy(),
    "U": _energy(),
    "H": _energy(),
    "G": _energy(),
    "Cv": _other("cal/(mol K)", 0.07212),
    "U0_atom": _energy(58.838),
    "U_atom": _energy(64.244),
    "H_atom": _energy(63.852),
    "G_atom": _energy(66.223),
    "A": _other("GHz"),
    "B": _other("GHz"),
    "C": _other("GHz"),
}

# In the order of the published tables, whose U0, U, H and G are the atomisation energies.
BENCHMARK: tuple[str, ...] = (
    "mu",
    "alpha",
    "homo",
    "lumo",
    "r2",
    "zpve",
    "U0_atom",
    "U_atom",
    "H_atom",
    "G_atom",
    "Cv",
)


def chosen_targets(names: Sequence[str]) -> dict[str, Target]:
    """Look up some of the targets, in the order given.

    Raises:
        ValueError: If there is no name, an unknown one, or one twice.
    """
    if not names or len(set(names)) != len(names) or not set(names) <= set(TARGETS):
        raise ValueError(f"targets={names!r} must name one or more of {tuple(TARGETS)}, each once.")
    return {name: TARGETS[name] for name in names}
