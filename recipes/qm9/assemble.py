"""The molecules of qm9pack, with the bonds and in the units that torch_geometric has."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from recipes.qm9.bonds import LONGEST_BOND, UnmatchedGraphError, find_bonds
from recipes.qm9.molecules import ELEMENTS, Molecules
from recipes.qm9.source import PROPERTIES, Row
from recipes.qm9.targets import TARGETS

__all__ = ["assemble"]

# The SMILES of these two molecules imply bonds of up to 1.44 times the sum of the covalent radii. No other molecule of
# QM9 exceeds 1.29. They are kept, as in torch_geometric's data set.
_LONGEST_BONDS = {133857: 1.45, 133859: 1.45}

# Conversion factors of torch_geometric.
_EV_PER_HARTREE = 27.211386246
_EV_PER_KCAL_MOL = 0.04336414
_KCAL_MOL_PER_HARTREE = 627.5094738
# Energies of single atoms of H, C, N, O and F in hartree, from the file atomref.txt of QM9.
_ATOM_ENERGIES: dict[str, tuple[float, ...]] = {
    "InternalEnergy_0K_au": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "InternalEnergy_298K_au": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "Enthalphy_298K_au": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "GibbsFreeEnergy_298K_au": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}


def assemble(rows: Iterable[Row]) -> Molecules:
    """Find the bonds of all molecules and convert their properties.

    Raises:
        UnmatchedGraphError: If a SMILES is not the graph of its coordinates. The message names both.
        ValueError: If the indices do not increase.
    """
    found = []
    for row in rows:
        coordinates = np.array(row.positions).reshape(-1, 3)
        longest = _LONGEST_BONDS.get(row.index, LONGEST_BOND)
        try:
            atoms, orders = find_bonds(row.smiles, row.elements, coordinates, longest)
        except UnmatchedGraphError as error:
            raise UnmatchedGraphError(f"Molecule with Index {row.index}: its SMILES {row.smiles!r} {error}.") from None
        elements = np.array(row.elements, np.uint8)
        found.append((row.index, elements, coordinates.astype(np.float32), atoms, orders, row.properties))
    index, elements, positions, bond_atoms, bond_orders, properties = zip(*found, strict=True)
    counts = np.array([np.bincount(atoms, minlength=len(ELEMENTS)) for atoms in elements])
    return Molecules(
        index=np.array(index, np.int32),
        num_atoms=np.array([len(atoms) for atoms in elements], np.uint8),
        num_bonds=np.array([len(orders) for orders in bond_orders], np.uint8),
        elements=np.concatenate(elements),
        positions=np.concatenate(positions),
        bond_atoms=np.concatenate(bond_atoms),
        bond_orders=np.concatenate(bond_orders),
        targets=_targets(np.array(properties), counts),
    )


def _targets(properties: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Convert `PROPERTIES` (M, 15), with the number of atoms of each element (M, 5), to `TARGETS` (M, 19)."""
    values = dict(zip(PROPERTIES, properties.T, strict=True))
    targets = np.empty((len(properties), len(TARGETS)), np.float32)
    for place, (name, target) in enumerate(TARGETS.items()):
        value, factor = values[target.column], _EV_PER_HARTREE if target.unit == "eV" else 1.0
        if name.endswith("_atom"):
            value = (value - counts @ np.array(_ATOM_ENERGIES[target.column])) * _KCAL_MOL_PER_HARTREE
            factor = _EV_PER_KCAL_MOL
        # torch_geometric rounds to single precision before this factor too.
        targets[:, place] = value.astype(np.float32) * np.float32(factor)
    return targets
