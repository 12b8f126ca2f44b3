"""Molecules as flat arrays: those of all molecules one after another, nothing padded."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from recipes.qm9.targets import TARGETS

__all__ = ["ATOMIC_NUMBERS", "BOND_TYPES", "ELEMENTS", "Molecules"]

ELEMENTS = ("H", "C", "N", "O", "F")
ATOMIC_NUMBERS = (1, 6, 7, 8, 9)
BOND_TYPES = ("single", "double", "triple", "aromatic")

_DTYPES = {
    "index": np.int32,
    "num_atoms": np.uint8,
    "num_bonds": np.uint8,
    "elements": np.uint8,
    "positions": np.float32,
    "bond_atoms": np.uint8,
    "bond_orders": np.uint8,
    "targets": np.float32,
}


@dataclass(frozen=True, eq=False)
class Molecules:
    """M molecules with A atoms and B bonds in all.

    Attributes:
        index: (M,) int32, number of the molecule in QM9, increasing and from 1 on.
        num_atoms: (M,) uint8.
        num_bonds: (M,) uint8.
        elements: (A,) uint8, 0 to 4 for H, C, N, O and F.
        positions: (A, 3) float32, in angstrom.
        bond_atoms: (B, 2) uint8, the two atoms of a bond, counted from 0 within the molecule. The first is the smaller
            one, and the bonds of a molecule are in increasing order.
        bond_orders: (B,) uint8, 1 single, 2 double, 3 triple; 4 aromatic, which torch_geometric has a type for and a
            Kekulé structure never has.
        targets: (M, 19) float32, in the order and the units of `TARGETS`.

    Raises:
        ValueError: If the arrays do not fit together.
    """

    index: NDArray[np.int32]
    num_atoms: NDArray[np.uint8]
    num_bonds: NDArray[np.uint8]
    elements: NDArray[np.uint8]
    positions: NDArray[np.float32]
    bond_atoms: NDArray[np.uint8]
    bond_orders: NDArray[np.uint8]
    targets: NDArray[np.float32]

    def __post_init__(self) -> None:
        atoms, bonds = int(self.num_atoms.sum(dtype=int)), int(self.num_bonds.sum(dtype=int))
        shapes = {
            "index": (len(self.index),),
            "num_atoms": (len(self.index),),
            "num_bonds": (len(self.index),),
            "elements": (atoms,),
            "positions": (atoms, 3),
            "bond_atoms": (bonds, 2),
            "bond_orders": (bonds,),
            "targets": (len(self.index), len(TARGETS)),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != _DTYPES[name]:
                raise ValueError(
                    f"The array {name!r} has shape {array.shape} and type {array.dtype}, where {shape} and"
                    f" {np.dtype(_DTYPES[name])} fit the others."
                )
        if (self.index[1:] <= self.index[:-1]).any():
            raise ValueError("The indices of the molecules do not increase.")
        smaller, larger = self.bond_atoms.T
        if (smaller >= larger).any() or (larger >= np.repeat(self.num_atoms, self.num_bonds)).any():
            raise ValueError("A bond joins atoms that its molecule does not have, or has its atoms in the wrong order.")
        for name, array, allowed in (
            ("elements", self.elements, range(len(ELEMENTS))),
            ("bond_orders", self.bond_orders, range(1, len(BOND_TYPES) + 1)),
        ):
            if len(array) and not allowed.start <= array.min() <= array.max() < allowed.stop:
                raise ValueError(f"The array {name!r} has values outside {allowed.start} to {allowed.stop - 1}.")
        for name in ("positions", "targets"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"The array {name!r} has values that are not finite.")

    def __len__(self) -> int:
        """Number of molecules."""
        return len(self.index)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
