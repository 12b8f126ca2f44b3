"""The shortest vector in the convex hull of a few vectors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []

# Of a derivative whose scale is 1: smaller ones are rounding.
_FLAT = 1e-12


def min_norm_weights(gramian: Tensor) -> Tensor:
    r"""The convex combination of vectors that is shortest, from their inner products.

    .. math:: \arg\min_{\alpha \ge 0, \sum_i \alpha_i = 1} \Big\| \sum_i \alpha_i v_i \Big\|

    It is exact up to rounding. Minimizing :math:`\|\sum_i x_i v_i\|^2 + (\sum_i x_i - 1)^2` over :math:`x \ge 0`
    gives a positive multiple of :math:`\alpha`. It is a least squares problem with non-negative unknowns, which the
    active set method of Lawson and Hanson (*Solving Least Squares Problems*, 1974) solves in finitely many small
    systems. The method of Frank and Wolfe, which MGDA takes, is off by a percent after a thousand iterations with 40
    tasks.

    Args:
        gramian: Inner products, shape :math:`(K, K)`, finite, with :math:`K \ge 1`.

    Returns:
        The weights :math:`\alpha`, of shape :math:`(K,)`, in double precision on the CPU.
    """
    gramian = gramian.detach().cpu().double()
    count = len(gramian)
    scale = gramian.diagonal().max()
    if scale <= 0:
        return torch.full((count,), 1 / count, dtype=torch.double)
    system = gramian / scale + 1
    solution = torch.zeros(count, dtype=torch.double)
    free = torch.zeros(count, dtype=torch.bool)
    # Each round lets one vector in. With exact numbers none comes back that has left for good.
    for _ in range(3 * count):
        descent = (1 - system @ solution).masked_fill(free, -torch.inf)
        if descent.max() <= _FLAT:
            break
        free[descent.argmax()] = True
        _solve_free(system, solution, free)
    return solution / solution.sum()


def _solve_free(system: Tensor, solution: Tensor, free: Tensor) -> None:
    """Minimize over the free unknowns, in place. Those that would become negative are fixed at 0."""
    while True:
        indices = free.nonzero().flatten()
        right = torch.ones(len(indices), 1, dtype=torch.double)
        # Not `solve`: rounding of the Gramian makes dependent vectors singular.
        best = torch.linalg.lstsq(system[indices][:, indices], right, driver="gelsd").solution.flatten()
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
