"""Optimizers of the Adam family, and their running averages written out by Eq. 13."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Adamax, AdamW, NAdam, Optimizer, RAdam
from torch.testing import assert_close

LR = 0.01


ADAMS: dict[str, Callable[..., Optimizer]] = {
    "Adam": lambda p, **kw: Adam(p, lr=LR, **kw),
    "Adam with L2": lambda p, **kw: Adam(p, lr=LR, weight_decay=0.1, **kw),
    "Adam, maximizing": lambda p, **kw: Adam(p, lr=LR, weight_decay=0.1, maximize=True, **kw),
    "Adam, foreach": lambda p, **kw: Adam(p, lr=LR, foreach=True, **kw),
    "Adam, fused": lambda p, **kw: Adam(p, lr=LR, fused=True, weight_decay=0.1, **kw),
    "Adam, tensor": lambda p, **kw: Adam(p, lr=torch.tensor(LR, dtype=torch.float64), **kw),
    "AdamW": lambda p, **kw: AdamW(p, lr=LR, weight_decay=0.1, **kw),
    "AdamW, maximizing": lambda p, **kw: AdamW(p, lr=LR, weight_decay=0.1, maximize=True, **kw),
    "AMSGrad": lambda p, **kw: Adam(p, lr=LR, amsgrad=True, **kw),
    "AMSGrad with L2": lambda p, **kw: Adam(p, lr=LR, amsgrad=True, weight_decay=0.1, **kw),
    "NAdam": lambda p, **kw: NAdam(p, lr=LR, **kw),
    "NAdam with L2": lambda p, **kw: NAdam(p, lr=LR, weight_decay=0.1, **kw),
    "NAdam, decoupled": lambda p, **kw: NAdam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True, **kw),
    "RAdam": lambda p, **kw: RAdam(p, lr=LR, **kw),
    "RAdam, maximizing": lambda p, **kw: RAdam(p, lr=LR, weight_decay=0.1, maximize=True, **kw),
    "RAdam, decoupled": lambda p, **kw: RAdam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True, **kw),
    "Adamax": lambda p, **kw: Adamax(p, lr=LR, **kw),
    "Adamax with L2": lambda p, **kw: Adamax(p, lr=LR, weight_decay=0.1, maximize=True, **kw),
}
if "decoupled_weight_decay" in inspect.signature(Adam).parameters:
    ADAMS["Adam, decoupled"] = lambda p, **kw: Adam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True, **kw)


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups. They all say whether weight decay is decoupled, which AdamW of PyTorch 2.6 leaves out."""
    decoupled = isinstance(optimizer, AdamW)
    return [{"decoupled_weight_decay": decoupled, **group} for group in optimizer.param_groups]


@dataclass
class Moments:
    """The running averages of one parameter by Eq. 13, from gradients alone."""

    first: Tensor
    second: Tensor
    largest: Tensor
    infinity: Tensor
    steps: int = 0

    @classmethod
    def like(cls, parameter: Tensor) -> Moments:
        return cls(*(torch.zeros_like(parameter) for _ in range(4)))

    def update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, sigma: float, mode: str) -> None:
        """One step from ``parameter`` with ``gradient``: Eq. 13 after a teleport, sigma = 1 otherwise."""
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        gradient = -gradient if group["maximize"] else gradient
        if not group["decoupled_weight_decay"]:
            gradient = gradient + decay * parameter
        if self.steps == 0:
            sigma = 1.0
        if mode == "reset" and sigma < 1:
            self.__dict__.update(Moments.like(parameter).__dict__)
            sigma = 1.0
        if mode == "keep":
            sigma = 1.0
        sigma2 = sigma if mode == "paper" else 1.0
        if mode == "paper":
            self.first = sigma * beta1 * self.first + (1 - sigma * beta1) * gradient
        else:
            fresh = (1 - beta1**self.steps) * gradient
            self.first = beta1 * (sigma * self.first + (1 - sigma) * fresh) + (1 - beta1) * gradient
        self.second = sigma2 * beta2 * self.second + (1 - sigma2 * beta2) * gradient**2
        # AMSGrad's maximum is modulated like the second moment before the step takes the larger one.
        self.largest = torch.maximum(sigma2 * self.largest + (1 - sigma2) * gradient**2, self.second)
        self.infinity = torch.maximum(sigma2 * beta2 * self.infinity, gradient.abs() + group["eps"])
        self.steps += 1

    def stepped(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """Where Adam goes from ``parameter`` with these moments."""
        (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), group["weight_decay"]
        if group["decoupled_weight_decay"]:
            parameter = parameter * (1 - lr * decay)
        second = self.largest if group["amsgrad"] else self.second
        first = self.first / (1 - beta1**self.steps)
        return parameter - lr * first / ((second / (1 - beta2**self.steps)).sqrt() + group["eps"])

    def check(self, state: dict[str, Any]) -> None:
        def same(name: str, expected: Tensor) -> None:
            if name in state:
                assert_close(state[name], expected, rtol=1e-9, atol=1e-14, msg=lambda text: f"{name}: {text}")

        assert float(state["step"]) == self.steps
        assert "exp_avg" in state
        same("exp_avg", self.first)
        same("exp_avg_sq", self.second)
        same("max_exp_avg_sq", self.largest)
        same("exp_inf", self.infinity)
