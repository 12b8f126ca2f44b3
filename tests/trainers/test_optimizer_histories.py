"""Historical trajectory reuse over training runs: Eq. 13 against optimizers written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_cost import PenaltySearch, SymmetryTeleportCallback
from lightning_cost._teleport.optimizer_state import HISTORY_MODES
from lightning_cost.objectives import RandomDirection
from lightning_cost.searches import Search, SearchContext
from tests.support.moments import ADAMS, Moments
from tests.support.moments import groups_of as described_groups
from tests.support.problems import Problem, jacobian, loss_function, mlp_batch, trainer

pytestmark = pytest.mark.slow

MakeOptimizer = Callable[[Any], Optimizer]


class Shift(Search):
    """Moves by fixed cosines with the mean gradient, whatever the losses become."""

    def __init__(self, cosines: Sequence[float]) -> None:
        self.cosines = list(cosines)
        self.moves: list[Tensor] = []

    def candidates(self, context: SearchContext) -> Iterator[None]:
        cosine = self.cosines[len(self.moves) % len(self.cosines)]
        uphill = nn.functional.normalize(context.start.gradients.mean, dim=0)
        noise = context.surface.standard_normal()
        across = nn.functional.normalize(noise - (noise @ uphill) * uphill, dim=0)
        self.moves.append(0.1 * (cosine * uphill + math.sqrt(1 - cosine**2) * across))
        context.surface.move_to(context.surface.position() + self.moves[-1])
        yield

    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        return shared


@dataclass
class Seen:
    """One optimizer step, seen right before it and after it."""

    before: dict[str, Tensor]
    gradients: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)


class Watched(Problem):
    """Writes down every optimizer step; Lightning clips the gradients as the last thing before it."""

    steps: list[Seen]

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        parameters = dict(self.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        self.steps.append(Seen(before, {name: p.grad.clone() for name, p in parameters.items()}))

    def on_train_batch_end(self, *args: Any) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        for name, parameter in self.named_parameters():
            self.steps[-1].after[name] = parameter.detach().clone()
            state = optimizer.state[parameter]
            self.steps[-1].state[name] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
            }


def groups_of(module: Problem) -> list[dict[str, Any]]:
    """A group for the first layer, one for the second, and one for the heads, with different betas."""
    return [
        {"params": list(module.backbone[0].parameters()), "betas": (0.8, 0.95), "lr": 0.02},
        {"params": list(module.backbone[2].parameters()), "betas": (0.9, 0.99)},
        {"params": list(module.heads.parameters()), "betas": (0.7, 0.9)},
    ]


CLIP = 0.3


def watch(teleport: SymmetryTeleportCallback, make: MakeOptimizer, steps: int = 12, **kwargs: Any) -> Watched:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        module = Watched(backbone, 4, optimizer=make).double()
    module.steps = []
    batches = DataLoader([mlp_batch(seed=seed) for seed in range(steps // 2)], batch_size=None)
    run = trainer(max_epochs=2, callbacks=[teleport], gradient_clip_val=CLIP, **kwargs)
    run.fit(module, batches)
    assert len(module.steps) == steps
    norms = [torch.cat([g.reshape(-1) for g in step.gradients.values()]).norm() for step in module.steps]
    assert max(norms) <= CLIP * (1 + 1e-5)
    assert any(norm > CLIP * 0.999 for norm in norms)
    return module


def sigmas_of(teleport: SymmetryTeleportCallback, steps: int) -> list[float | None]:
    sigmas: list[float | None] = [None] * steps
    for report in teleport.reports:
        assert report.accepted
        sigmas[report.step] = report.sigma
    return sigmas


def shifting(history: Any, cosines: Sequence[float] = (0.5, 0.6, -0.4, 0.9)) -> SymmetryTeleportCallback:
    return SymmetryTeleportCallback(
        trigger=lambda gradients: True,
        objective=RandomDirection(),
        search=Shift(cosines),
        start_epoch=0,
        check_every_n_steps=2,
        tolerance=None,
        history=history,
    )


def check_run(module: Watched, sigmas: Sequence[float | None], mode: str) -> None:
    groups = {}
    for group in described_groups(module.optimizers(use_pl_optimizer=False)):
        groups.update({id(parameter): group for parameter in group["params"]})
    for name, parameter in module.named_parameters():
        group = groups[id(parameter)]
        reference = Moments.like(parameter.detach())
        for sigma, step in zip(sigmas, module.steps, strict=True):
            modulated = sigma is not None and name.startswith("backbone.")
            kept = min(max(sigma, 0.0), 1.0) if modulated else 1.0
            if mode == "reset" and modulated:
                kept = 0.0
            reference.update(group, step.before[name], step.gradients[name], kept, mode)
            reference.check(step.state[name])
            if "amsgrad" in group:
                expected = reference.stepped(group, step.before[name])
                assert_close(step.after[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Adam", "Adam with L2", "AdamW", "AMSGrad with L2", "NAdam", "RAdam", "Adamax"])
def test_paper_is_equation_13_over_a_training_run(name: str) -> None:
    teleport = shifting("paper")
    module = watch(teleport, lambda module: ADAMS[name](groups_of(module)))
    sigmas = sigmas_of(teleport, 12)
    assert [sigma is not None for sigma in sigmas] == [True, False] * 6
    assert [round(sigma, 6) for sigma in sigmas[::2]] == [0.5, 0.6, -0.4, 0.9, 0.5, 0.6]
    check_run(module, sigmas, "paper")


@pytest.mark.parametrize("mode", ["momentum", "reset", "keep"])
def test_the_other_modes_over_a_training_run(mode: str) -> None:
    teleport = shifting(mode)
    module = watch(teleport, lambda module: ADAMS["AdamW"](groups_of(module)))
    check_run(module, sigmas_of(teleport, 12), mode)


def test_the_modes_differ() -> None:
    ends = []
    for mode in HISTORY_MODES:
        module = watch(shifting(mode), lambda module: ADAMS["Adam"](groups_of(module)))
        ends.append(module.steps[-1].after["backbone.0.weight"])
    for i, end in enumerate(ends):
        assert all((end - other).abs().max() > 1e-4 for other in ends[:i])


def test_momentum_of_sgd_over_a_training_run() -> None:
    teleport = shifting("paper")
    module = watch(teleport, lambda module: SGD(module.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01))
    sigmas = sigmas_of(teleport, 12)
    for name in dict(module.named_parameters()):
        buffer: Tensor | None = None
        for sigma, step in zip(sigmas, module.steps, strict=True):
            gradient = step.gradients[name] + 0.01 * step.before[name]
            kept = 1.0 if sigma is None or not name.startswith("backbone.") else min(max(sigma, 0.0), 1.0)
            if buffer is None:
                buffer = gradient
            else:
                buffer = 0.8 * (kept * buffer + (1 - kept) * gradient / (1 - 0.8)) + gradient
            assert_close(step.state[name]["momentum_buffer"], buffer, rtol=1e-9, atol=1e-12)
            assert_close(step.after[name], step.before[name] - 0.1 * buffer, rtol=1e-9, atol=1e-12)


def test_the_reported_sigma_is_that_of_the_move() -> None:
    teleport = shifting("paper")
    module = watch(teleport, lambda module: ADAMS["Adam"](groups_of(module)))
    shared = [name for name, _ in module.named_parameters() if name.startswith("backbone.")]

    def flat(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].reshape(-1) for name in shared])

    for report in teleport.reports[1:]:
        index = report.step
        origin, arrived = flat(module.steps[index - 1].after), flat(module.steps[index].before)
        everything = {**module.steps[index - 1].after}
        module.load_state_dict(everything)
        gradient = jacobian(loss_function(module, mlp_batch(seed=index % 6)), origin).detach().mean(dim=0)
        move = arrived - origin
        assert_close(report.sigma, float(move @ gradient / (move.norm() * gradient.norm())), rtol=1e-8, atol=1e-10)


def test_the_settings_of_the_paper_train_by_its_equations() -> None:
    teleport = SymmetryTeleportCallback.paper(
        trigger=lambda gradients: True,
        start_epoch=0,
        max_per_epoch=None,
        check_every_n_steps=3,
        search=PenaltySearch(steps=4, lr=0.01, gamma=0.1, relative=False),
    )
    module = watch(teleport, lambda module: ADAMS["Adam"](groups_of(module)))
    sigmas = sigmas_of(teleport, 12)
    assert [index for index, sigma in enumerate(sigmas) if sigma is not None] == [0, 3, 6, 9]
    assert all(sigma != 0 for sigma in sigmas)
    check_run(module, sigmas, "paper")


def test_nothing_is_modulated_where_a_teleport_is_refused() -> None:
    teleport = SymmetryTeleportCallback(
        trigger=lambda gradients: True,
        objective=RandomDirection(),
        search=Shift([0.9]),
        start_epoch=0,
        tolerance=1e-9,
        history="reset",
    )
    module = watch(teleport, lambda module: ADAMS["Adam"](groups_of(module)))
    assert len(teleport.reports) == 12
    assert not any(report.accepted for report in teleport.reports)
    check_run(module, [None] * 12, "reset")
