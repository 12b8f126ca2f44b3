"""The message-passing network of the benchmark, on padded batches and in plain torch.

It is the network of torch_geometric's example `qm9_nn_conv`, which the public code of Nash-MTL, FAMO and FairGrad
trains: Linear, three rounds of NNConv and GRU with shared weights, Set2Set, Linear (Gilmer et al., Neural Message
Passing for Quantum Chemistry, ICML 2017). All its matrices belong to `nn.Linear`: every adapter reaches them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.qm9.graphs import NUM_EDGE_FEATURES, NUM_NODE_FEATURES, edge_features, neighbors, node_features

__all__ = ["EdgeConv", "GatedUnit", "MoleculeNet", "Set2Set"]


class EdgeConv(nn.Module):
    r"""Mean over the neighbors :math:`j` of :math:`x_j W(e_{ij})`, plus a linear map of :math:`x_i`.

    torch_geometric's `NNConv` makes a matrix :math:`W(e_{ij})` for every edge. It is linear in the hidden features
    :math:`h_{ij}` of the edge network, :math:`W(e_{ij}) = \sum_k h_{ijk} W_k`, so that the sum over the neighbors can
    come first: one batched product, then one matrix for all atoms.

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
        """Hidden features of the edges, which are the same in every round.

        Args:
            edges: (B, N, N, 5).
            pairs: (B, N, N), which pairs are edges.

        Returns:
            (B, N * (edge_hidden + 1), N): each target's mean over its neighbors; the last feature is the bias's.
        """
        hidden = F.relu(self.edge_in(edges))
        hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=3)
        shares = pairs / pairs.sum(dim=2, keepdim=True).clamp(min=1)
        return (hidden * shares.unsqueeze(3)).transpose(2, 3).flatten(1, 2)

    def forward(self, atoms: Tensor, weighed: Tensor) -> Tensor:
        """One round of messages.

        Args:
            atoms: (B, N, width).
            weighed: What `weigh_edges` returned.

        Returns:
            (B, N, width).
        """
        gathered = torch.bmm(weighed, atoms).view(*atoms.shape[:2], -1)
        return gathered @ self._matrix() + self.root(atoms)

    def _matrix(self) -> Tensor:
        """((edge_hidden + 1) * width, width): the matrices of hidden features and bias below each other."""
        matrices = torch.cat([self.edge_out.weight.T, self.edge_out.bias.unsqueeze(0)])
        return matrices.view(-1, self.width)


class GatedUnit(nn.Module):
    """A gated recurrent unit (as `nn.GRUCell`) whose matrices are two `nn.Linear`.

    Args:
        width: Features of input and state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * width)
        self.hidden = nn.Linear(width, 3 * width)

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        """The next state, of the shape of both arguments (..., width)."""
        reset_in, update_in, new_in = self.input(inputs).chunk(3, dim=-1)
        reset, update, new = self.hidden(state).chunk(3, dim=-1)
        update = torch.sigmoid(update_in + update)
        candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
        return candidate + update * (state - candidate)


class Set2Set(nn.Module):
    """Reads the atoms several times, each time attending to what its LSTM asks for (Vinyals et al., ICLR 2016).

    The matrices of the LSTM are two `nn.Linear`.

    Args:
        width: Features of an atom.
        steps: How often to read.
    """

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.width, self.steps = width, steps
        self.input = nn.Linear(2 * width, 4 * width)
        self.hidden = nn.Linear(width, 4 * width)
        # As in `nn.LSTM`, whose scale is that of the state.
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.input.weight, -bound, bound)
        nn.init.uniform_(self.input.bias, -bound, bound)

    def forward(self, atoms: Tensor, mask: Tensor) -> Tensor:
        """One vector a molecule.

        Args:
            atoms: (B, N, width).
            mask: (B, N), True where there is an atom.

        Returns:
            (B, 2 * width): the last question and its answer.
        """
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
    """Molecules to features that the tasks share.

    Args:
        width: Features of an atom, and of a molecule.
        edge_hidden: Hidden features of the network that makes the matrix of an edge.
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
        """Features of molecules.

        Args:
            elements: (B, N), from 0 to 4 for H, C, N, O and F.
            bonds: (B, N, N), 0 for no bond, else its type from 1 to 4.
            positions: (B, N, 3), in angstrom.
            mask: (B, N), True where there is an atom.

        Returns:
            (B, width).
        """
        atoms = F.relu(self.embedding(node_features(elements, bonds, mask).to(positions.dtype)))
        weighed = self.messages.weigh_edges(edge_features(bonds, positions), neighbors(mask))
        for _ in range(self.rounds):
            atoms = self.update(F.relu(self.messages(atoms, weighed)), atoms)
        return F.relu(self.out(self.readout(atoms, mask)))
