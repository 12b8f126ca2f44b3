"""The shortest vector in the convex hull of a few vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []

# Of a derivative whose scale is 1: smaller ones are rounding.
_FLAT = 1e-12
_PIECE = 2**16


def shortest_combination(rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""The convex combination of vectors that is shortest.

    .. math:: \min_{\alpha \ge 0, \sum_i \alpha_i = 1} \Big\| \sum_i \alpha_i v_i \Big\|

    With :math:`u_i` the vectors made as long as 1, and :math:`w_i` inverse to their lengths, it minimizes
    :math:`\|\sum_i y_i u_i\|^2 + (\sum_i w_i y_i - 1)^2` over :math:`y \ge 0`. There, :math:`w_i y_i` is a positive
    multiple of :math:`\alpha_i`. This is a least squares problem with non-negative unknowns, which the active set
    method of Lawson and Hanson (*Solving Least Squares Problems*, 1974) solves in finitely many small systems. The
    method of Frank and Wolfe, which MGDA takes, is off by a percent after a thousand iterations with 40 tasks.

    It takes double precision and no inner products. So squares do not overflow, lengths may differ by many orders of
    magnitude, and opposite vectors cancel.

    Args:
        rows: The vectors, shape :math:`(K, P)`, finite, with :math:`K \ge 1`.

    Returns:
        The weights :math:`\alpha`, of shape :math:`(K,)`, and the length of the combination, a scalar. Both are in
        double precision on the CPU.
    """
    present = rows.detach().count_nonzero(dim=1).gt(0).cpu()
    if not bool(present.all()):
        weights = present.logical_not().double()
        return weights / weights.sum(), torch.zeros((), dtype=torch.double)
    columns = _triangle(rows)
    scale = columns.abs().max()
    lengths = (columns / scale).norm(dim=0) * scale
    nearness = lengths.min() / lengths
    solution = _non_negative(torch.cat([columns / lengths, nearness[None]])) * nearness
    weights = solution / solution.sum()
    return weights, (columns / scale @ weights).norm() * scale


def _triangle(rows: Tensor) -> Tensor:
    """The vectors as columns, turned into a space of at most as many dimensions as there are vectors."""
    # Apple's GPUs have no double precision.
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device
    columns = torch.zeros(0, len(rows), dtype=torch.double, device=device)
    for piece in rows.detach().split(_PIECE, dim=1):
        columns = torch.linalg.qr(torch.cat([columns, piece.to(device).double().T]), mode="r").R
    return columns.cpu()


def _non_negative(matrix: Tensor) -> Tensor:
    """The non-negative unknowns with which the columns of a matrix come nearest to the last unit vector."""
    target = torch.zeros(len(matrix), dtype=torch.double)
    target[-1] = 1
    solution, free = torch.zeros(matrix.shape[1], dtype=torch.double), torch.zeros(matrix.shape[1], dtype=torch.bool)
    # Each round lets one vector in. With exact numbers none comes back that has left for good.
    for _ in range(3 * len(solution)):
        descent = (matrix.T @ (target - matrix @ solution)).masked_fill(free, -torch.inf)
        if descent.max() <= _FLAT:
            break
        free[descent.argmax()] = True
        _solve_free(matrix, target, solution, free)
    return solution


def _solve_free(matrix: Tensor, target: Tensor, solution: Tensor, free: Tensor) -> None:
    """Minimize over the free unknowns, in place. Those that would become negative are fixed at 0."""
    while True:
        indices = free.nonzero().flatten()
        # Vectors may depend on each other.
        best = torch.linalg.lstsq(matrix[:, indices], target[:, None], driver="gelsd").solution.flatten()
        now = solution[indices]
        negative = best <= 0
        if not bool(negative.any()):
            solution[indices] = best
            return
        share = (now[negative] / (now[negative] - best[negative])).min()
        moved = now + share * (best - now)
        leaves = negative & (moved <= moved[negative].min())
        solution[indices] = moved.masked_fill(leaves, 0)
        free[indices[leaves]] = False
