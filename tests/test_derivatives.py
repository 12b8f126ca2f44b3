"""Finite differences of gradients."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from lightning_cost import Surface
from lightning_cost._derivatives import hessian_vector


def test_the_difference_of_a_quadratic_is_its_hessian() -> None:
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    weight = Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
    surface = Surface(lambda: {"bowl": weight @ hessian @ weight / 2, "slope": weight.sum()}, [weight])
    point, vector = surface.point(), torch.tensor([0.5, 4.0], dtype=torch.float64)
    weights, before = torch.tensor([1.0, 1.0], dtype=torch.float64), weight.detach().clone()
    gradient = point.gradients.matrix.sum(dim=0)
    found = hessian_vector(surface, weights, gradient, vector, 1e-3)
    torch.testing.assert_close(found, hessian @ vector)
    assert torch.equal(weight, before)
    assert not hessian_vector(surface, weights, gradient, torch.zeros_like(vector), 1e-3).any()
