"""Historical trajectory reuse: Eq. 13 against optimizers written out, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_cost import SymmetryTeleportCallback
from lightning_cost._teleport.optimizer_state import HISTORY_MODES, HistoryReuse, modulate
from tests.support.moments import ADAMS, LR, Moments, groups_of
from tests.support.problems import mlp_batch, mlp_problem, trainer


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999])
def test_modulating_before_adam_is_equation_13(sigma: float, beta: float) -> None:
    history = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    fresh = torch.tensor([0.5, 3.0, -1.0], dtype=torch.float64)
    expected = sigma * beta * history + (1 - sigma * beta) * fresh
    modulate(history, fresh, sigma)
    assert_close(beta * history + (1 - beta) * fresh, expected, rtol=1e-12, atol=1e-14)


def moved_steps(optimizer: Optimizer, history: HistoryReuse, sigmas: Sequence[float | None]) -> Iterator[int]:
    """Steps with random gradients, of which those with a sigma follow a move."""
    generator = torch.Generator().manual_seed(0)
    optimizer.register_step_pre_hook(history.pre_step_hook)
    moving: list[Parameter] = [p for group in optimizer.param_groups for p in group["params"]][:1]
    for index, sigma in enumerate(sigmas):
        for parameter in [p for group in optimizer.param_groups for p in group["params"]]:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if sigma is not None:
            history.arm(sigma, moving)
        yield index
        optimizer.step()
        history.disarm()


SIGMAS = [0.5, None, None, 0.7, None, -0.4, 0.2, None, 1.0, 0.0, None]


@pytest.mark.parametrize("name", list(ADAMS))
@pytest.mark.parametrize("mode", HISTORY_MODES)
def test_moments_follow_equation_13(name: str, mode: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    moving, other = (Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [moving], "betas": (0.8, 0.95)}, {"params": [other], "betas": (0.9, 0.99)}]
    optimizer = ADAMS[name](groups)
    history = HistoryReuse(mode)
    history.check(optimizer)
    references = {p: Moments.like(p.detach()) for p in (moving, other)}
    expected: dict[Parameter, Tensor] = {}
    for index in moved_steps(optimizer, history, SIGMAS):
        for group in groups_of(optimizer):
            (parameter,) = group["params"]
            if index:
                references[parameter].check(optimizer.state[parameter])
            if index and parameter in expected:
                assert_close(parameter.detach(), expected[parameter], rtol=1e-10, atol=1e-13)
            raw = SIGMAS[index] if parameter is moving else None
            sigma = 1.0 if raw is None else min(max(raw, 0.0), 1.0)
            if mode == "reset" and raw is not None:
                sigma = 0.0
            position, grad = parameter.detach().clone(), parameter.grad.clone()
            references[parameter].update(group, position, grad, sigma, mode)
            if type(optimizer) in (Adam, AdamW):
                expected[parameter] = references[parameter].stepped(group, position)
    assert len(references) == 2


def test_sigma_is_clamped() -> None:
    states = []
    for sigma in (-3.0, 0.0, 1.0, 7.0):
        parameter = Parameter(torch.ones(3, dtype=torch.float64))
        optimizer, history = Adam([parameter]), HistoryReuse("paper")
        list(moved_steps(optimizer, history, [None, None, sigma]))
        states.append(optimizer.state[parameter])
    for below, at in ((states[0], states[1]), (states[3], states[2])):
        assert torch.equal(below["exp_avg"], at["exp_avg"])
        assert torch.equal(below["exp_avg_sq"], at["exp_avg_sq"])
    assert (states[0]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("mode", HISTORY_MODES)
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.0},
    ],
)
def test_momentum_of_sgd_becomes_the_sum_of_a_constant_gradient(mode: Any, settings: dict[str, Any]) -> None:
    parameter, other = (Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    optimizer, history = SGD([parameter, other], lr=0.1, **settings), HistoryReuse(mode)
    history.check(optimizer)
    momentum, dampening = settings["momentum"], settings.get("dampening", 0.0)
    buffers: dict[Parameter, Tensor | None] = {parameter: None, other: None}
    for index in moved_steps(optimizer, history, SIGMAS):
        for p, buffer in buffers.items():
            if index and momentum:
                assert_close(optimizer.state[p]["momentum_buffer"], buffer, rtol=1e-10, atol=1e-12)
            gradient = -p.grad if settings.get("maximize") else p.grad.clone()
            gradient = gradient + settings.get("weight_decay", 0.0) * p.detach()
            raw = SIGMAS[index] if p is parameter and mode != "keep" else None
            if mode == "reset" and raw is not None:
                buffer = None  # noqa: PLW2901
            if buffer is None:
                buffers[p] = gradient
                continue
            sigma = 1.0 if raw is None else min(max(raw, 0.0), 1.0)
            # What g = (1 - dampening) g + momentum g + ... sums to.
            total = sum((1 - dampening) * momentum**k for k in range(2000)) * gradient
            buffers[p] = momentum * (sigma * buffer + (1 - sigma) * total) + (1 - dampening) * gradient
    if not momentum:
        assert all(not state or state.get("momentum_buffer") is None for state in optimizer.state.values())


@pytest.mark.parametrize("name", [*ADAMS, "SGD"])
def test_after_a_reset_the_step_is_the_first_one(name: str) -> None:
    def make(parameter: Parameter) -> Optimizer:
        return SGD([parameter], lr=LR, momentum=0.9) if name == "SGD" else ADAMS[name]([parameter])

    start = torch.linspace(-1, 1, 5, dtype=torch.float64)
    old, new = Parameter(start.clone()), Parameter(start.clone())
    optimizer, history = make(old), HistoryReuse("reset")
    for _ in moved_steps(optimizer, history, [None, None, None]):
        pass
    fresh = make(new)
    with torch.no_grad():
        old.copy_(start)
    for index in range(3):
        for parameter in (old, new):
            parameter.grad = torch.full_like(parameter, 0.3 + index)
        if index == 0:
            history.arm(0.9, [old])
        optimizer.step()
        fresh.step()
        assert torch.equal(old, new)


def test_fresh_momentum_agrees_with_the_bias_correction() -> None:
    # With sigma = 0 nothing is kept: the corrected average is the gradient itself, however early the step.
    for steps in (1, 2, 5):
        parameter = Parameter(torch.ones(3, dtype=torch.float64))
        optimizer, history = Adam([parameter], betas=(0.9, 0.99)), HistoryReuse("momentum")
        for _ in moved_steps(optimizer, history, [None] * steps + [0.0]):
            gradient = parameter.grad
        assert_close(optimizer.state[parameter]["exp_avg"] / (1 - 0.9 ** (steps + 1)), gradient)


@pytest.mark.parametrize("kind", [Adagrad, RMSprop])
def test_unknown_optimizers_are_refused_unless_everything_is_kept(kind: type[Optimizer]) -> None:
    optimizer = kind([Parameter(torch.ones(2))], lr=0.1)
    HistoryReuse("keep").check(optimizer)
    for mode in ("paper", "momentum", "reset"):
        with pytest.raises(
            MisconfigurationException, match=rf"`history='{mode}'` knows .* got {kind.__name__}.*`history='keep'`"
        ):
            HistoryReuse(mode).check(optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Adagrad, RMSprop])
def test_a_training_run_refuses_unknown_optimizers_before_it_starts(kind: type[Optimizer]) -> None:
    data = DataLoader([mlp_batch()], batch_size=None)
    for mode in HISTORY_MODES:
        module = mlp_problem(optimizer=lambda module: kind(module.parameters(), lr=0.01))
        teleport = SymmetryTeleportCallback(trigger="weak", start_epoch=0, history=mode)
        run = trainer(max_epochs=1, callbacks=[teleport])
        if mode == "keep":
            run.fit(module, data)
            assert run.global_step == 1
            continue
        with pytest.raises(MisconfigurationException, match=f"`history='{mode}'` knows the state of Adam"):
            run.fit(module, data)
        assert run.global_step == 0


@pytest.mark.parametrize("mode", ["paper ", "Paper", None, "all"])
def test_unknown_modes_are_refused(mode: Any) -> None:
    for make in (lambda: HistoryReuse(mode), lambda: SymmetryTeleportCallback(history=mode)):
        with pytest.raises(ValueError, match=rf"`history` must be one of .*'keep'.* got {mode!r}"):
            make()


@pytest.mark.parametrize("how", ["none", "positional", "keyword"])
def test_the_closure_comes_first_and_its_result_is_returned(how: str) -> None:
    parameter = Parameter(torch.ones(2, dtype=torch.float64))
    optimizer, history = Adam([parameter], betas=(0.5, 0.9)), HistoryReuse("paper")
    list(moved_steps(optimizer, history, [None, None]))
    before = optimizer.state[parameter]["exp_avg"].clone()
    gradient = torch.tensor([2.0, -3.0], dtype=torch.float64)

    def closure() -> float:
        history.arm(0.5, [parameter])
        parameter.grad = gradient.clone()
        return 7.0

    if how == "none":
        closure()
        optimizer.step()
    else:
        assert (optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)) == 7.0
    assert_close(optimizer.state[parameter]["exp_avg"], 0.5 * 0.5 * before + (1 - 0.5 * 0.5) * gradient)


def test_a_move_changes_one_step_only() -> None:
    states = []
    for sigmas in ([None, 0.3, None], [None, 0.3, 1.0]):
        parameter = Parameter(torch.ones(2, dtype=torch.float64))
        optimizer, history = Adam([parameter]), HistoryReuse("paper")
        list(moved_steps(optimizer, history, sigmas))
        states.append(optimizer.state[parameter]["exp_avg"])
    assert torch.equal(*states)


def test_disarming_leaves_everything() -> None:
    parameter, plain = (Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer, history, reference = Adam([parameter]), HistoryReuse("paper"), Adam([plain])
    optimizer.register_step_pre_hook(history.pre_step_hook)
    for index in range(3):
        for p in (parameter, plain):
            p.grad = torch.full_like(p, 1.0 + index)
        history.arm(0.0, [parameter])
        history.disarm()
        optimizer.step()
        reference.step()
    assert torch.equal(parameter, plain)


def test_a_parameter_without_gradient_keeps_its_history() -> None:
    parameter, idle = (Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer, history = Adam([parameter, idle]), HistoryReuse("paper")
    list(moved_steps(optimizer, history, [None]))
    before = {name: value.clone() for name, value in optimizer.state[idle].items()}
    parameter.grad, idle.grad = torch.ones_like(parameter), None
    history.arm(0.0, [parameter, idle])
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[idle].items())


def test_sparse_gradients_are_modulated_like_dense_ones() -> None:
    buffers = []
    for sparse in (False, True):
        table = nn.Embedding(5, 2, sparse=sparse).double()
        with torch.no_grad():
            table.weight.fill_(1.0)
        optimizer, history = SGD(table.parameters(), lr=0.1, momentum=0.9), HistoryReuse("paper")
        optimizer.register_step_pre_hook(history.pre_step_hook)
        for index in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).pow(2).sum().backward()
            if index == 2:
                history.arm(0.4, [table.weight])
            optimizer.step()
        buffers.append(optimizer.state[table.weight]["momentum_buffer"].to_dense())
    assert_close(*buffers)
