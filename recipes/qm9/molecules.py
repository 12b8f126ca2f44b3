"""Molecules as flat arrays, and padded batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.qm9.targets import TARGETS

__all__ = ["ATOMIC_NUMBERS", "BOND_TYPES", "ELEMENTS", "MoleculeTensors", "Molecules", "num_molecules"]

ELEMENTS = ("H", "C", "N", "O", "F")
ATOMIC_NUMBERS = (1, 6, 7, 8, 9)
BOND_TYPES = ("single", "double", "triple", "aromatic")


@dataclass(frozen=True, eq=False)
class Molecules:
    """M molecules with A atoms and B bonds in total. Each array holds one molecule after another, without padding.

    Attributes:
        index: Number of the molecule in QM9, from 1 and increasing; (M,) int32.
        num_atoms: (M,) uint8.
        num_bonds: (M,) uint8.
        elements: 0 to 4 for H, C, N, O and F; (A,) uint8.
        positions: (A, 3) float32, in angstrom.
        bond_atoms: The two atoms of a bond, counted from 0 within the molecule; (B, 2) uint8. The smaller number comes
            first, and the bonds of a molecule are in increasing order.
        bond_orders: 1 single, 2 double, 3 triple, 4 aromatic; (B,) uint8. torch_geometric has a type for aromatic
            bonds, but a Kekulé structure has none of them.
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
        num, atoms, bonds = len(self), int(self.num_atoms.sum(dtype=int)), int(self.num_bonds.sum(dtype=int))
        expected = {
            "index": ((num,), np.int32),
            "num_atoms": ((num,), np.uint8),
            "num_bonds": ((num,), np.uint8),
            "elements": ((atoms,), np.uint8),
            "positions": ((atoms, 3), np.float32),
            "bond_atoms": ((bonds, 2), np.uint8),
            "bond_orders": ((bonds,), np.uint8),
            "targets": ((num, len(TARGETS)), np.float32),
        }
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"The array {name!r} has shape {array.shape} and type {array.dtype}, but must have {shape} and"
                    f" {np.dtype(dtype)} to fit the others."
                )
        if (self.index[1:] <= self.index[:-1]).any():
            raise ValueError("The indices of the molecules do not increase.")
        smaller, larger = self.bond_atoms.T
        if (smaller >= larger).any() or (larger >= np.repeat(self.num_atoms, self.num_bonds)).any():
            raise ValueError("A bond joins atoms that its molecule does not have, or has its atoms in the wrong order.")
        for name, least, most in (("elements", 0, len(ELEMENTS) - 1), ("bond_orders", 1, len(BOND_TYPES))):
            array = getattr(self, name)
            if len(array) and not least <= array.min() <= array.max() <= most:
                raise ValueError(f"The array {name!r} has values outside {least} to {most}.")
        for name in ("positions", "targets"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"The array {name!r} has values that are not finite.")

    def __len__(self) -> int:
        return len(self.index)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class MoleculeTensors:
    """Molecules in memory. Any batch is put together from them without a loop.

    Args:
        molecules: The molecules.
        targets: Columns of `molecules.targets` that a batch has, in its order.
    """

    def __init__(self, molecules: Molecules, targets: list[int]) -> None:
        self.targets = torch.from_numpy(molecules.targets[:, targets])
        self._elements = torch.from_numpy(molecules.elements)
        self._positions = torch.from_numpy(molecules.positions)
        self._bond_atoms = torch.from_numpy(molecules.bond_atoms)
        self._bond_orders = torch.from_numpy(molecules.bond_orders)
        self._num_atoms = torch.from_numpy(molecules.num_atoms.astype(np.int64))
        self._num_bonds = torch.from_numpy(molecules.num_bonds.astype(np.int64))
        self._first_atom = self._num_atoms.cumsum(0) - self._num_atoms
        self._first_bond = self._num_bonds.cumsum(0) - self._num_bonds

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Put the molecules with the indices `rows` (B,) together.

        Returns:
            With N atoms in the largest molecule: `elements` (B, N) uint8, 0 to 4 for H, C, N, O and F; `bonds`
            (B, N, N) uint8, symmetric, 0 none, 1 single, 2 double, 3 triple, 4 aromatic; `positions` (B, N, 3) float32,
            in angstrom; `mask` (B, N) bool, False beyond the last atom, where the others are 0; `targets` (B, T)
            float32, in the units of `TARGETS`.
        """
        num_atoms, num_bonds = self._num_atoms[rows], self._num_bonds[rows]
        size = int(num_atoms.max())
        mask = torch.arange(size) < num_atoms.unsqueeze(1)
        atoms = (self._first_atom[rows].unsqueeze(1) + torch.arange(size))[mask]
        elements = torch.zeros(len(rows), size, dtype=torch.uint8)
        elements[mask] = self._elements[atoms]
        positions = torch.zeros(len(rows), size, 3)
        positions[mask] = self._positions[atoms]

        owner = torch.repeat_interleave(num_bonds)
        within = torch.arange(len(owner)) - (num_bonds.cumsum(0) - num_bonds)[owner]
        chosen = self._first_bond[rows][owner] + within
        first, second = self._bond_atoms[chosen].long().unbind(1)
        bonds = torch.zeros(len(rows), size, size, dtype=torch.uint8)
        bonds[owner, first, second] = bonds[owner, second, first] = self._bond_orders[chosen]
        targets = self.targets[rows]
        return {"elements": elements, "bonds": bonds, "positions": positions, "mask": mask, "targets": targets}


def num_molecules(batch: Mapping[str, Tensor]) -> int:
    """Number of molecules in a batch, from which `ThroughputMonitor` computes the throughput."""
    return len(batch["targets"])
