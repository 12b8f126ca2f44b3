"""Batches of molecules, padded to the largest of each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from recipes.qm9.molecules import Molecules

__all__ = ["MoleculeTensors", "num_molecules"]


class MoleculeTensors:
    """Molecules in memory, from which any batch is put together without a loop.

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
        """Put some molecules together.

        Args:
            rows: (B,), which ones, by their place in the arrays.

        Returns:
            With N atoms in the largest of them: `elements` (B, N) uint8, 0 to 4 for H, C, N, O and F; `bonds` (B, N, N)
            uint8, symmetric, 0 none, 1 single, 2 double, 3 triple, 4 aromatic; `positions` (B, N, 3) float32, in
            angstrom; `mask` (B, N) bool, False beyond the last atom, where all others are 0; `targets` (B, T) float32,
            in the units of `TARGETS`.
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
        return {
            "elements": elements,
            "bonds": bonds,
            "positions": positions,
            "mask": mask,
            "targets": self.targets[rows],
        }


def num_molecules(batch: Mapping[str, Tensor]) -> int:
    """Molecules of a batch, which is what throughput counts."""
    return len(batch["targets"])
