"""The message-passing network of the benchmark, on padded batches and in plain PyTorch.

It is the network of torch_geometric's example `qm9_nn_conv`, which the public code of Nash-MTL, FAMO and FairGrad
trains: Linear, three rounds of NNConv and GRU with shared weights, Set2Set, Linear (Gilmer et al., Neural Message
Passing for Quantum Chemistry, ICML 2017). All its matrices belong to `nn.Linear` layers, so adapters reach all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.qm9.molecules import ATOMIC_NUMBERS, BOND_TYPES, ELEMENTS

__all__ = [
    "NUM_NODE_FEATURES",
    "EdgeConv",
    "GatedUnit",
    "MoleculeNet",
    "Set2Set",
    "complete_graph",
    "edge_features",
    "node_features",
]

# Aromatic, sp, sp2 and sp3. torch_geometric reads its file without RDKit's perception, so they are always zero.
_NUM_EMPTY = 4
NUM_NODE_FEATURES = len(ELEMENTS) + 1 + _NUM_EMPTY + 1
NUM_EDGE_FEATURES = len(BOND_TYPES) + 1
_HYDROGEN = ELEMENTS.index("H")


def node_features(elements: Tensor, bonds: Tensor, mask: Tensor) -> Tensor:
    """The 11 features of torch_geometric's QM9, (B, N, 11); see `MoleculeNet.forward` for the arguments.

    They are the element, one-hot; the atomic number; four zeros; and the number of hydrogens bonded to the atom. All
    are zero where there is no atom.
    """
    elements = elements.long()
    numbers = torch.tensor(ATOMIC_NUMBERS, dtype=torch.float32, device=elements.device)[elements]
    hydrogens = ((bonds > 0) & ((elements == _HYDROGEN) & mask).unsqueeze(1)).sum(dim=2)
    empty = torch.zeros(*elements.shape, _NUM_EMPTY, device=elements.device)
    one_hot = F.one_hot(elements, len(ELEMENTS)).float()
    features = torch.cat([one_hot, numbers.unsqueeze(2), empty, hydrogens.float().unsqueeze(2)], dim=2)
    return features * mask.unsqueeze(2)


def edge_features(bonds: Tensor, positions: Tensor) -> Tensor:
    """Type of the bond, one-hot, and distance of every pair of atoms, (B, N, N, 5).

    The type is all zero without a bond. The distance is that of torch_geometric's transform `Distance(norm=False)`. See
    `MoleculeNet.forward` for the arguments.
    """
    types = F.one_hot(bonds.long(), len(BOND_TYPES) + 1)[..., 1:].to(positions.dtype)
    distances = torch.linalg.vector_norm(positions.unsqueeze(2) - positions.unsqueeze(1), dim=3, keepdim=True)
    return torch.cat([types, distances], dim=3)


def complete_graph(mask: Tensor) -> Tensor:
    """The pairs of different atoms, (B, N, N), for a mask (B, N) of the atoms."""
    different = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(2) & mask.unsqueeze(1) & different


class EdgeConv(nn.Module):
    r"""Mean over the neighbors :math:`j` of :math:`x_j W(e_{ij})`, plus a linear map of :math:`x_i`.

    torch_geometric's `NNConv` makes a matrix :math:`W(e_{ij})` for every edge. It is linear in the hidden features
    :math:`h_{ij}` of the edge network, :math:`W(e_{ij}) = \sum_k h_{ijk} W_k`. So this layer takes the sum over the
    neighbors first, by one batched product, and then multiplies by one matrix for all atoms.

    Args:
        width: Features of an atom.
        edge_hidden: Hidden features of the edge network.
    """

    def __init__(self, width: int, edge_hidden: int) -> None:
        super().__init__()
        self.width = width
        self.edge_in = nn.Linear(NUM_EDGE_FEATURES, edge_hidden)
        self.edge_out = nn.Linear(edge_hidden, width * width)
        self.root = nn.Linear(width, width)
        nn.init.zeros_(self.root.bias)

    def weigh_edges(self, edges: Tensor, pairs: Tensor) -> Tensor:
        """Weight the hidden features of the edges for a mean over the neighbors. They are the same in every round.

        Args:
            edges: Features of the pairs, (B, N, N, 5).
            pairs: Which pairs are edges, (B, N, N).

        Returns:
            (B, N * (edge_hidden + 1), N). The last hidden feature is 1, for the bias.
        """
        hidden = F.relu(self.edge_in(edges))
        hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=3)
        shares = pairs / pairs.sum(dim=2, keepdim=True).clamp(min=1)
        return (hidden * shares.unsqueeze(3)).transpose(2, 3).flatten(1, 2)

    def forward(self, atoms: Tensor, weighed: Tensor) -> Tensor:
        """One round of messages between the atoms (B, N, width), along the edges that `weigh_edges` returned."""
        gathered = torch.bmm(weighed, atoms).view(*atoms.shape[:2], -1)
        # The matrices of the hidden features and of the bias, one below the other: ((edge_hidden + 1) * width, width).
        matrices = torch.cat([self.edge_out.weight.T, self.edge_out.bias.unsqueeze(0)]).view(-1, self.width)
        return gathered @ matrices + self.root(atoms)


class GatedUnit(nn.Module):
    """A gated recurrent unit like `nn.GRUCell`, whose matrices are two `nn.Linear` layers.

    Args:
        width: Features of input and state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * width)
        self.hidden = nn.Linear(width, 3 * width)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The next state; all have the shape (..., width)."""
        reset_in, update_in, new_in = self.input(inputs).chunk(3, dim=-1)
        reset, update, new = self.hidden(state).chunk(3, dim=-1)
        update = torch.sigmoid(update_in + update)
        candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
        return candidate + update * (state - candidate)


class Set2Set(nn.Module):
    """Attends to the atoms several times, each time with a query from an LSTM (Vinyals et al., ICLR 2016).

    The matrices of the LSTM are two `nn.Linear` layers.

    Args:
        width: Features of an atom.
        steps: Number of times.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.width, self.steps = width, steps
        self.input = nn.Linear(2 * width, 4 * width)
        self.hidden = nn.Linear(width, 4 * width)
        # As in `nn.LSTM`, whose bound depends on the width of the state.
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.input.weight, -bound, bound)
        nn.init.uniform_(self.input.bias, -bound, bound)

    def forward(self, atoms: Tensor, mask: Tensor) -> Tensor:
        """The last query and its answer, (B, 2 * width), for atoms (B, N, width) and their mask (B, N)."""
        state = cell = atoms.new_zeros(len(atoms), self.width)
        read = atoms.new_zeros(len(atoms), 2 * self.width)
        for _ in range(self.steps):
            entry, keep, new, out = (self.input(read) + self.hidden(state)).chunk(4, dim=1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(entry) * torch.tanh(new)
            state = torch.sigmoid(out) * torch.tanh(cell)
            scores = torch.einsum("bnw,bw->bn", atoms, state).masked_fill(~mask, -torch.inf)
            read = torch.cat([state, torch.einsum("bn,bnw->bw", scores.softmax(dim=1), atoms)], dim=1)
        return read


class MoleculeNet(nn.Module):
    """Computes the features of molecules that the tasks share.

    Args:
        width: Features of an atom and of a molecule.
        edge_hidden: Hidden features of the edge network.
        rounds: Rounds of messages.
        reads: Steps of Set2Set.

    Raises:
        ValueError: If an argument is below 1.
    """

    def __init__(self, width: int = 64, edge_hidden: int = 128, rounds: int = 3, reads: int = 3) -> None:
        super().__init__()
        for name, value in (("width", width), ("edge_hidden", edge_hidden), ("rounds", rounds), ("reads", reads)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.rounds = rounds
        self.embedding = nn.Linear(NUM_NODE_FEATURES, width)
        self.messages = EdgeConv(width, edge_hidden)
        self.update = GatedUnit(width)
        self.readout = Set2Set(width, reads)
        self.out = nn.Linear(2 * width, width)

    def forward(self, elements: Tensor, bonds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Features of molecules, (B, width).

        Args:
            elements: From 0 to 4 for H, C, N, O and F; (B, N).
            bonds: 0 for no bond, else 1 to 4 for single, double, triple and aromatic; (B, N, N).
            positions: (B, N, 3), in angstrom.
            mask: True where there is an atom, (B, N).
        """
        atoms = F.relu(self.embedding(node_features(elements, bonds, mask).to(positions.dtype)))
        weighed = self.messages.weigh_edges(edge_features(bonds, positions), complete_graph(mask))
        for _ in range(self.rounds):
            atoms = self.update(F.relu(self.messages(atoms, weighed)), atoms)
        return F.relu(self.out(self.readout(atoms, mask)))
