"""Molecules as the features of the benchmark: every pair of atoms is an edge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.qm9.molecules import ATOMIC_NUMBERS, BOND_TYPES, ELEMENTS

__all__ = ["NUM_EDGE_FEATURES", "NUM_NODE_FEATURES", "edge_features", "neighbors", "node_features"]

# Aromatic, sp, sp2 and sp3.
_NUM_EMPTY = 4
NUM_NODE_FEATURES = len(ELEMENTS) + 1 + _NUM_EMPTY + 1
NUM_EDGE_FEATURES = len(BOND_TYPES) + 1
_HYDROGEN = ELEMENTS.index("H")


def node_features(elements: Tensor, bonds: Tensor, mask: Tensor) -> Tensor:
    """The 11 features of torch_geometric's QM9.

    They are which of H, C, N, O and F it is, the atomic number, four that are zero in that data set (aromatic, sp, sp2
    and sp3, which it reads without RDKit's perception), and the number of hydrogens that the atom is bonded to.

    Args:
        elements: (B, N), from 0 to 4 for H, C, N, O and F.
        bonds: (B, N, N), 0 where there is no bond.
        mask: (B, N), False where a molecule has no more atoms.

    Returns:
        (B, N, 11), zero where there is no atom.
    """
    elements = elements.long()
    numbers = torch.tensor(ATOMIC_NUMBERS, dtype=torch.float32, device=elements.device)[elements]
    hydrogens = ((bonds > 0) & ((elements == _HYDROGEN) & mask).unsqueeze(1)).sum(dim=2)
    empty = torch.zeros(*elements.shape, _NUM_EMPTY, device=elements.device)
    one_hot = F.one_hot(elements, len(ELEMENTS)).float()
    features = torch.cat([one_hot, numbers.unsqueeze(2), empty, hydrogens.float().unsqueeze(2)], dim=2)
    return features * mask.unsqueeze(2)


def edge_features(bonds: Tensor, positions: Tensor) -> Tensor:
    """Type of the bond (single, double, triple, aromatic; all zero without one) and distance, of every pair of atoms.

    They are those of torch_geometric's transform `Distance(norm=False)` on the complete graph.

    Args:
        bonds: (B, N, N), 0 for no bond, else the type from 1 to 4.
        positions: (B, N, 3), in angstrom.

    Returns:
        (B, N, N, 5).
    """
    types = F.one_hot(bonds.long(), len(BOND_TYPES) + 1)[..., 1:].to(positions.dtype)
    distances = torch.linalg.vector_norm(positions.unsqueeze(2) - positions.unsqueeze(1), dim=3, keepdim=True)
    return torch.cat([types, distances], dim=3)


def neighbors(mask: Tensor) -> Tensor:
    """Which pairs are edges of the complete graph: two different atoms that are both there.

    Args:
        mask: (B, N), True where there is an atom.

    Returns:
        (B, N, N), boolean.
    """
    different = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(2) & mask.unsqueeze(1) & different
