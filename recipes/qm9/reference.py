"""The network of the benchmark in torch_geometric's layers, for comparison with the dense one."""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import NNConv
from torch_geometric.nn import Set2Set as GeometricSet2Set

from recipes.qm9.network import MoleculeNet, complete_graph, edge_features, node_features

__all__ = ["GeometricNet", "as_one_graph"]

_LAYERS = {
    "embedding": "embedding",
    "out": "out",
    "conv.nn.0": "messages.edge_in",
    "conv.nn.2": "messages.edge_out",
}
_CELLS = {"gru": "update", "set2set.lstm": "readout"}
_GATES = {"ih": "input", "hh": "hidden"}
_KINDS = ("weight", "bias")


class GeometricNet(nn.Module):
    """torch_geometric's example `qm9_nn_conv` without its last layer, with the weights of a dense network.

    Args:
        dense: The network whose sizes and weights to take.

    Attributes:
        names: Name of each parameter to its name in `MoleculeNet`.
    """

    names: ClassVar[dict[str, str]] = {
        "conv.lin.weight": "messages.root.weight",
        "conv.bias": "messages.root.bias",
        **{f"{layer}.{kind}": f"{dense}.{kind}" for (layer, dense), kind in product(_LAYERS.items(), _KINDS)},
        **{
            f"{cell}.{kind}_{short}_l0": f"{dense}.{gate}.{kind}"
            for (cell, dense), (short, gate), kind in product(_CELLS.items(), _GATES.items(), _KINDS)
        },
    }

    def __init__(self, dense: MoleculeNet) -> None:
        super().__init__()
        width, first = dense.out.out_features, dense.messages.edge_in
        edge_network = nn.Sequential(
            nn.Linear(first.in_features, first.out_features), nn.ReLU(), nn.Linear(first.out_features, width * width)
        )
        self.embedding, self.out = nn.Linear(dense.embedding.in_features, width), nn.Linear(2 * width, width)
        self.conv = NNConv(width, width, edge_network, aggr="mean")
        self.gru = nn.GRU(width, width)
        self.set2set = GeometricSet2Set(width, processing_steps=dense.readout.steps)
        self.rounds = dense.rounds
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(dense.get_parameter(self.names[name]))

    def forward(self, nodes: Tensor, edges: Tensor, features: Tensor, molecules: Tensor) -> Tensor:
        """Features of molecules, (B, width), from what `as_one_graph` returns."""
        atoms = F.relu(self.embedding(nodes))
        state = atoms.unsqueeze(0)
        for _ in range(self.rounds):
            atoms, state = self.gru(F.relu(self.conv(atoms, edges, features)).unsqueeze(0), state)
            atoms = atoms.squeeze(0)
        return F.relu(self.out(self.set2set(atoms, molecules)))


def as_one_graph(
    elements: Tensor, bonds: Tensor, positions: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convert a padded batch to torch_geometric's form; see `MoleculeNet.forward` for the arguments.

    Returns:
        Features of the atoms (A, 11), pairs of atoms (2, E), features of the pairs (E, 5), molecule of each atom (A,).
    """
    pairs = complete_graph(mask)
    molecule, target, source = pairs.nonzero(as_tuple=True)
    first = mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1)
    edges = torch.stack([first[molecule] + source, first[molecule] + target])
    atoms = node_features(elements, bonds, mask)[mask].to(positions.dtype)
    return atoms, edges, edge_features(bonds, positions)[pairs], mask.nonzero()[:, 0]
