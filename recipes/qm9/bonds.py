"""The bonds of a molecule from its SMILES, in the order of its coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from recipes.qm9.molecules import ATOMIC_NUMBERS

__all__ = ["LONGEST_BOND", "UnmatchedGraphError", "find_bonds"]

# Covalent radii of H, C, N, O and F in angstrom: Cordero et al., Dalton Trans. 2008, doi:10.1039/b801115j.
_RADII = np.array([0.31, 0.76, 0.71, 0.66, 0.57])
# In units of the sum of the radii. Only two molecules have bonds above 1.29, see `assemble`.
LONGEST_BOND = 1.3
_HYDROGEN = ATOMIC_NUMBERS.index(1)
_MAX_MATCHES = 100_000


class UnmatchedGraphError(ValueError):
    """A SMILES is not the graph of its coordinates."""


def find_bonds(
    smiles: str, elements: Sequence[int], positions: NDArray[np.float64], longest_bond: float = LONGEST_BOND
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Find which atoms of the coordinates the bonds of a SMILES join.

    The SMILES decides the Kekulé structure. The hydrogens that valences require are added after the atoms that it
    names. Often its atoms are in the order of the coordinates: the elements agree and no bond is stretched. Otherwise,
    for instance where the SMILES starts at the other end, its graph is matched with the graph of the closest pairs of
    atoms. If there are several matches, as for the two oxygens of a carboxylate, the match with the shortest multiple
    bonds is taken.

    Args:
        smiles: SMILES.
        elements: From 0 to 4 for H, C, N, O and F; (N,).
        positions: (N, 3), in angstrom.
        longest_bond: A longer bond is stretched; in units of the sum of the covalent radii.

    Returns:
        Pairs of atoms (B, 2) and orders (B,), in the order of `Molecules`.

    Raises:
        UnmatchedGraphError: If the SMILES cannot be read or is not the graph of the coordinates.
    """
    spelled, orders = _graph(smiles)
    if sorted(spelled) != sorted(elements):
        raise UnmatchedGraphError("has other atoms than the coordinates")
    pairs = np.argwhere(np.triu(orders))
    orders = orders[pairs[:, 0], pairs[:, 1]]
    if spelled == list(elements) and _stretch(pairs, spelled, positions).max(initial=0) <= longest_bond:
        return pairs.astype(np.uint8), orders.astype(np.uint8)
    pairs = _match(spelled, pairs, orders, elements, positions)
    if _stretch(pairs, elements, positions).max(initial=0) > longest_bond:
        raise UnmatchedGraphError("has a bond between atoms that are far apart in the coordinates")
    order = np.lexsort(pairs.T[::-1])
    return pairs[order].astype(np.uint8), orders[order].astype(np.uint8)


def _graph(smiles: str) -> tuple[list[int], NDArray[np.float64]]:
    """Elements and bond orders (N, N) of all atoms."""
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles, sanitize=False)
        if molecule is None:
            raise UnmatchedGraphError("is not a SMILES that RDKit can read")
        try:
            # Without the perception of aromaticity, the Kekulé structure stays as written. The clean-up turns
            # five-valent nitrogens into charged ones.
            Chem.SanitizeMol(molecule, Chem.SANITIZE_CLEANUP | Chem.SANITIZE_PROPERTIES | Chem.SANITIZE_KEKULIZE)
        except Chem.MolSanitizeException as error:
            raise UnmatchedGraphError(f"is not a molecule: {error}") from None
    try:
        elements = [ATOMIC_NUMBERS.index(atom.GetAtomicNum()) for atom in molecule.GetAtoms()]
    except ValueError:
        raise UnmatchedGraphError("has an element other than H, C, N, O and F") from None
    molecule = Chem.AddHs(molecule)
    elements += [_HYDROGEN] * (molecule.GetNumAtoms() - len(elements))
    return elements, Chem.GetAdjacencyMatrix(molecule, useBO=True)


def _stretch(pairs: NDArray[np.int64], elements: Sequence[int], positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances of pairs of atoms in units of the sum of their radii."""
    radii = _RADII[list(elements)]
    first, second = pairs.T
    return np.linalg.norm(positions[first] - positions[second], axis=1) / (radii[first] + radii[second])


def _match(
    spelled: Sequence[int],
    pairs: NDArray[np.int64],
    orders: NDArray[np.float64],
    elements: Sequence[int],
    positions: NDArray[np.float64],
) -> NDArray[np.int64]:
    """The bonded pairs of a SMILES as pairs of atoms of the coordinates, the smaller number first."""
    every = np.argwhere(np.triu(np.ones((len(elements), len(elements))), 1))
    closest = every[np.argsort(_stretch(every, elements, positions))[: len(pairs)]]
    found = _skeleton(elements, closest).GetSubstructMatches(
        _skeleton(spelled, pairs), uniquify=False, maxMatches=_MAX_MATCHES
    )
    if not found:
        raise UnmatchedGraphError("is not the graph of the coordinates")
    ends = np.array(found)[:, pairs]
    lengths = np.linalg.norm(positions[ends[:, :, 0]] - positions[ends[:, :, 1]], axis=2)
    return np.sort(ends[np.argmin(lengths @ orders)], axis=1)


def _skeleton(elements: Sequence[int], pairs: NDArray[np.int64]) -> Chem.Mol:
    """A molecule with single bonds only and without charges."""
    molecule = Chem.RWMol()
    for element in elements:
        atom = Chem.Atom(ATOMIC_NUMBERS[element])
        atom.SetNoImplicit(True)
        molecule.AddAtom(atom)
    for first, second in pairs.tolist():
        molecule.AddBond(first, second, Chem.BondType.SINGLE)
    return molecule.GetMol()
