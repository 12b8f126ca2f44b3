"""Historical trajectory reuse: Eq. 12 and 13 against optimizers written out, step by step and in training runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_cost import PenaltySearch, SymmetryTeleportCallback
from lightning_cost._teleport.optimizer_state import HISTORY_MODES, HistoryReuse, modulate
from lightning_cost._teleport.run import trajectory_similarity
from lightning_cost.objectives import RandomDirection
from lightning_cost.searches import Search, SearchContext
from tests.support.problems import Problem, jacobian, loss_function, mlp_batch, mlp_problem, trainer

MakeOptimizer = Callable[[Any], Optimizer]

# --------------------------------------------------------------------------------------------------------------- Eq. 12


@pytest.mark.parametrize(
    ("move", "gradient", "sigma"),
    [
        ([3.0, 4.0], [4.0, 3.0], 0.96),
        ([1.0, 0.0], [2.0, 0.0], 1.0),
        ([1.0, 1.0], [-1.0, -1.0], -1.0),
        ([1.0, 0.0], [0.0, 5.0], 0.0),
        ([0.0, 0.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3e-20, 4e-20], [4e-25, 3e-25], 0.96),
        ([3e15, 4e15], [4e20, 3e20], 0.96),
    ],
)
def test_trajectory_similarity_is_the_cosine(move: list[float], gradient: list[float], sigma: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = trajectory_similarity(torch.tensor(move, dtype=dtype), torch.tensor(gradient, dtype=dtype))
        assert math.isclose(found, sigma, rel_tol=1e-6, abs_tol=1e-12)


# ------------------------------------------------------------------------------------------- Eq. 13, one step at a time


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999])
def test_modulating_before_adam_is_equation_13(sigma: float, beta: float) -> None:
    history = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    fresh = torch.tensor([0.5, 3.0, -1.0], dtype=torch.float64)
    expected = sigma * beta * history + (1 - sigma * beta) * fresh
    modulate(history, fresh, sigma)
    assert_close(beta * history + (1 - beta) * fresh, expected, rtol=1e-12, atol=1e-14)


LR = 0.01
ADAMS: dict[str, Callable[..., Optimizer]] = {
    "Adam": lambda p, **kw: Adam(p, lr=LR, **kw),
    "Adam with L2": lambda p, **kw: Adam(p, lr=LR, weight_decay=0.1, **kw),
    "Adam, decoupled": lambda p, **kw: Adam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True, **kw),
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
        if not group.get("decoupled_weight_decay", False):
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
        for group in optimizer.param_groups:
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


# ------------------------------------------------------------------------------------------ rule 8, whole training runs


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
    for group in module.optimizers(use_pl_optimizer=False).param_groups:
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
