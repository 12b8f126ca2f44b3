"""The molecules of a folder that torch_geometric's QM9 has processed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.qm9.molecules import ATOMIC_NUMBERS, BOND_TYPES, ELEMENTS, Molecules
from recipes.qm9.network import NUM_NODE_FEATURES

__all__ = ["load_processed"]

# The name that torch_geometric.datasets.QM9 has used since version 1.7.
_PROCESSED = Path("processed") / "data_v3.pt"


def load_processed(root: str | Path) -> Molecules:
    """Read what `torch_geometric.datasets.QM9(root)` has processed; nothing is downloaded.

    Its positions have four decimals. Its bonds come from DeepChem's file, and some differ from those of `find_bonds`.

    Args:
        root: The folder given to torch_geometric.

    Raises:
        ModuleNotFoundError: If torch_geometric is not installed.
        FileNotFoundError: If the folder has no processed file.
        ValueError: If torch_geometric did not write that file.
    """
    try:
        from torch_geometric.data import InMemoryDataset  # noqa: PLC0415 (needed for this alone)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading root needs torch_geometric, which is not installed: pip install torch_geometric. Or leave root"
            " out to use the package qm9pack."
        ) from error

    path = Path(root) / _PROCESSED
    if not path.is_file():
        raise FileNotFoundError(
            f"root={str(root)!r} has no {_PROCESSED}. Let torch_geometric.datasets.QM9({str(root)!r}) write it, or"
            " leave root out to use the package qm9pack."
        )
    # The class QM9 would download what it does not find.
    dataset = InMemoryDataset()
    try:
        dataset.load(str(path))
        return _molecules(dataset)
    except Exception as error:
        # Unpickling another file raises many kinds of exceptions.
        raise ValueError(
            f"{path} is not as torch_geometric.datasets.QM9 writes it without pre_transform: {error}"
        ) from error


def _molecules(dataset: Any) -> Molecules:
    data, slices = dataset._data, dataset.slices
    features, ends, types = data.x.numpy(), data.edge_index.numpy(), data.edge_attr.numpy()
    num_atoms, num_edges = np.diff(slices["x"].numpy()), np.diff(slices["edge_attr"].numpy())
    if features.shape[1] != NUM_NODE_FEATURES or types.shape[1] != len(BOND_TYPES):
        raise ValueError(
            f"atoms have {features.shape[1]} and edges {types.shape[1]} features instead of"
            f" {NUM_NODE_FEATURES} and {len(BOND_TYPES)}"
        )
    elements = features[:, : len(ELEMENTS)].argmax(1).astype(np.uint8)
    # Every bond is stored in both directions.
    once = ends[0] < ends[1]
    owner = np.repeat(np.arange(len(num_edges)), num_edges)[once]
    molecules = Molecules(
        index=(data.idx.numpy() + 1).astype(np.int32),
        num_atoms=num_atoms.astype(np.uint8),
        num_bonds=np.bincount(owner, minlength=len(num_atoms)).astype(np.uint8),
        elements=elements,
        positions=data.pos.numpy(),
        bond_atoms=ends.T[once].astype(np.uint8),
        bond_orders=(types[once].argmax(1) + 1).astype(np.uint8),
        targets=data.y.numpy(),
    )
    if 2 * once.sum() != len(once):
        raise ValueError("not every bond has two directions")
    if not np.array_equal(_features(molecules), features):
        raise ValueError("features of atoms are not those that their elements and bonds give")
    return molecules


def _features(molecules: Molecules) -> NDArray[np.float32]:
    """The features of all atoms, (A, 11), as `node_features` computes them for a batch."""
    features = np.zeros((len(molecules.elements), NUM_NODE_FEATURES), np.float32)
    features[np.arange(len(features)), molecules.elements] = 1
    features[:, len(ELEMENTS)] = np.array(ATOMIC_NUMBERS)[molecules.elements]
    first_atom = np.cumsum(molecules.num_atoms, dtype=int) - molecules.num_atoms
    ends = molecules.bond_atoms + np.repeat(first_atom, molecules.num_bonds)[:, None]
    for atom, other in (ends.T, ends.T[::-1]):
        np.add.at(features[:, -1], atom, ELEMENTS[0] == np.array(ELEMENTS)[molecules.elements[other]])
    return features
