"""The targets of QM9, in the order and the units of torch_geometric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BENCHMARK", "TARGETS", "Target", "chosen_targets"]


@dataclass(frozen=True)
class Target:
    """One property of a molecule.

    Attributes:
        column: Column of qm9pack that it is computed from.
        unit: Unit of the data. Errors are reported in the same unit, but in meV for energies in eV.
        single_task_mae: Mean absolute error, in the reported unit, of a network that is trained on this target alone.
            Published Δm% are relative to these values. None: the benchmark does not use the target.
    """

    column: str
    unit: str
    single_task_mae: float | None = None

    @property
    def report_unit(self) -> str:
        """Unit in which errors are reported."""
        return "meV" if self.unit == "eV" else self.unit

    @property
    def report_factor(self) -> float:
        """Factor from `unit` to `report_unit`."""
        return 1000.0 if self.unit == "eV" else 1.0


TARGETS: dict[str, Target] = {
    "mu": Target("Dipole_debye", "D", 0.0671),
    "alpha": Target("Polarizability_bohr3", "a0^3", 0.1814),
    "homo": Target("HOMO_au", "eV", 60.576),
    "lumo": Target("LUMO_au", "eV", 53.915),
    "gap": Target("HOMO_LUMO_gap_au", "eV"),
    "r2": Target("R2_bohr2", "a0^2", 0.5027),
    "zpve": Target("ZPVE_au", "eV", 4.539),
    "U0": Target("InternalEnergy_0K_au", "eV"),
    "U": Target("InternalEnergy_298K_au", "eV"),
    "H": Target("Enthalphy_298K_au", "eV"),
    "G": Target("GibbsFreeEnergy_298K_au", "eV"),
    "Cv": Target("Heatcapacity_Cv_cal_mol_K", "cal/(mol K)", 0.07212),
    "U0_atom": Target("InternalEnergy_0K_au", "eV", 58.838),
    "U_atom": Target("InternalEnergy_298K_au", "eV", 64.244),
    "H_atom": Target("Enthalphy_298K_au", "eV", 63.852),
    "G_atom": Target("GibbsFreeEnergy_298K_au", "eV", 66.223),
    "A": Target("RotA_GHz", "GHz"),
    "B": Target("RotB_GHz", "GHz"),
    "C": Target("RotC_GHz", "GHz"),
}

# In the order of the published tables. Their U0, U, H and G are the atomization energies.
BENCHMARK = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "U0_atom", "U_atom", "H_atom", "G_atom", "Cv")


def chosen_targets(names: Sequence[str]) -> dict[str, Target]:
    """Look up some of the targets, in the order given.

    Raises:
        ValueError: If there is no name, an unknown one, or one twice.
    """
    if not names or len(set(names)) != len(names) or not set(names) <= set(TARGETS):
        raise ValueError(f"targets={names!r} must name one or more of {tuple(TARGETS)}, each once.")
    return {name: TARGETS[name] for name in names}
