"""Symmetry teleportation as a Lightning callback."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from peft import LoraConfig, PeftConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cost.adapters import check_config, left_out
from lightning_cost.distributed import Ranks
from lightning_cost.gradients import TaskGradients, num_elements
from lightning_cost.history import History, HistoryReuse
from lightning_cost.invariance import Invariance, drift
from lightning_cost.landscape import Landscape, Point, grads_are_finite
from lightning_cost.mixin import MultiTaskMixin
from lightning_cost.objectives import ConflictAlignment, GradientNorm, Objective, SampledSharpness
from lightning_cost.progress import StageDisplay
from lightning_cost.replay import RecordedBatch, without_trace
from lightning_cost.searches import LevelSetSearch, PenaltySearch, Search
from lightning_cost.support import check_optimizer, check_strategy, gradient_scaler, keep_what_compiled_code_saves
from lightning_cost.teleport import Outcome, Teleporter, TeleportReport
from lightning_cost.triggers import TRIGGERS, Schedule, Trigger, TriggerName

__all__ = ["SymmetryTeleportCallback"]

ObjectiveName = Literal["conflict", "sharpness", "gradient_norm"]
SearchName = Literal["level_set", "penalty"]

_OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "conflict": ConflictAlignment,
    "sharpness": SampledSharpness,
    "gradient_norm": GradientNorm,
}
_SEARCHES: dict[str, Callable[[], Search]] = {"level_set": LevelSetSearch, "penalty": PenaltySearch}


class SymmetryTeleportCallback(Callback):
    r"""Teleports the shared module, when its tasks conflict, to a point with the same losses and less conflict (COST).

    Add it to the Trainer of any :class:`~lightning_cost.mixin.MultiTaskMixin`. Before an optimizer step it checks the
    trigger on the task gradients. If they conflict, it searches for a change of the shared weights that leaves the task
    losses on the batch as they are and lessens the conflict, and moves there if there is one; a teleport that fails
    changes nothing. The step then goes on from the new point with its own task gradients, by whatever multi-task method
    the module uses. With the callback removed, the module trains with that method alone.

    The defaults are what evidence favored, not what the paper does; :meth:`paper` gives its settings.

    Args:
        trigger: When to teleport. ``"dominated"``: the task with the smallest gradient conflicts with the mean (Eq. 3).
            ``"majority"``: at least half of the tasks do (Eq. 4). ``"any"``: any does. ``"weak"``: any two tasks
            conflict. Or a function from :class:`~lightning_cost.gradients.TaskGradients` to a bool.
        objective: What to increase: ``"conflict"`` (:class:`~lightning_cost.objectives.ConflictAlignment`),
            ``"sharpness"`` (:class:`~lightning_cost.objectives.SampledSharpness`, Eq. 8 to 10), ``"gradient_norm"``
            (:class:`~lightning_cost.objectives.GradientNorm`), or an objective.
        search: How to get there: ``"level_set"`` (:class:`~lightning_cost.searches.LevelSetSearch`), ``"penalty"``
            (:class:`~lightning_cost.searches.PenaltySearch`, Eq. 11), or a search.
        adapter: PEFT configuration of the change of the weights; ``None`` for LoRA of rank 5, the paper's. Its
            ``target_modules``, if set, choose among the layers of the shared module.
        start_epoch: First epoch with checks, counted from 0.
        max_per_epoch: Most teleports tried in an epoch; ``None`` for no limit.
        check_every_n_steps: Check the trigger at every n-th optimizer step.
        tolerance: Largest accepted relative change of a task loss on the teleport's batches. ``None`` accepts every
            finite result, as the paper does.
        invariance: What the tolerance holds for: the loss of each task (``"per_task"``) or their ``"mean"``.
        num_batches: How many of the most recent batches define the level set.
        history: What the optimizer keeps of its history: ``"keep"`` all, ``"paper"`` as much as Eq. 12 and 13 say,
            ``"momentum"`` likewise but only of the first moment, ``"reset"`` nothing.
        seed: Seed of the random numbers of the search. The training loop's own are never touched.
        check_ranks: Whether to compare the shared parameters of all processes of DDP after each teleport, by their
            checksums, and stop if they differ. It costs next to nothing.

    Attributes:
        reports: A :class:`~lightning_cost.teleport.TeleportReport` for each teleport that was tried.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup`` or ``on_fit_start``, if the Trainer or the module is not supported.

    Example::

        class LitModel(MultiTaskMixin, LightningModule): ...


        teleport = SymmetryTeleportCallback()
        trainer = Trainer(callbacks=[teleport])
        trainer.fit(LitModel(), datamodule=...)
        print(sum(report.accepted for report in teleport.reports))

    Logs once an epoch: ``cost/conflict_share`` (share of the checks that found conflict), the counts ``cost/accepted``
    and ``cost/rejected``, and the means over the accepted teleports of ``cost/drift``, ``cost/cosine_before`` and
    ``cost/cosine_after`` (the smallest cosine of a task with the mean). ``reports`` has them one by one.
    """

    def __init__(
        self,
        trigger: TriggerName | Trigger = "dominated",
        objective: ObjectiveName | Objective = "conflict",
        search: SearchName | Search = "level_set",
        adapter: PeftConfig | None = None,
        start_epoch: int = 1,
        max_per_epoch: int | None = None,
        check_every_n_steps: int = 1,
        tolerance: float | None = 0.02,
        invariance: Invariance = "per_task",
        num_batches: int = 1,
        history: History = "keep",
        seed: int = 0,
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        if not callable(trigger) and trigger not in TRIGGERS:
            raise ValueError(
                f"`trigger` must be one of {list(TRIGGERS)} or a function of TaskGradients; got {trigger!r}."
            )
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise ValueError(f"`tolerance` must be a positive number, or None for no limit; got {tolerance!r}.")
        if invariance not in get_args(Invariance):
            raise ValueError(f"`invariance` must be one of {list(get_args(Invariance))}; got {invariance!r}.")
        if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1:
            raise ValueError(f"`num_batches` must be an integer of at least 1; got {num_batches!r}.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"`seed` must be an integer; got {seed!r}.")
        self.trigger: Trigger = trigger if callable(trigger) else TRIGGERS[trigger]
        self.schedule = Schedule(start_epoch, max_per_epoch, check_every_n_steps)
        self.num_batches = num_batches
        self.check_ranks = check_ranks
        self.reports: list[TeleportReport] = []
        self._teleporter = Teleporter(
            _objective(objective),
            _search(search),
            check_config(LoraConfig(r=5) if adapter is None else adapter),
            invariance,
            tolerance,
        )
        self._history = HistoryReuse(history)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = _EpochCounts()
        self._due: bool | None = None
        self._recent: list[RecordedBatch] = []
        self._recent_state: list[list[dict[str, Any]]] = []
        self._ranks = Ranks()
        self._warned = False
        self._hook: RemovableHandle | None = None

    @classmethod
    def paper(cls, **overrides: Any) -> SymmetryTeleportCallback:
        """Algorithm 1 with the settings of the paper.

        The trigger of Eq. 4, sampled sharpness as printed in Eq. 9, Adam on a LoRA of rank 5 with ``gamma=0.1`` and the
        absolute loss fluctuation of Eq. 7, no acceptance test, historical trajectory reuse by Eq. 13, and at most one
        teleport an epoch. What the paper leaves open (number of Adam steps, samples, radius) has the defaults of
        :class:`~lightning_cost.searches.PenaltySearch` and :class:`~lightning_cost.objectives.SampledSharpness`.

        Args:
            overrides: Arguments of :class:`SymmetryTeleportCallback` to set otherwise, such as ``start_epoch``, which
                the paper sets to a quarter of the epochs.
        """
        settings: dict[str, Any] = {
            "trigger": "majority",
            "objective": SampledSharpness(form="loss"),
            "search": PenaltySearch(gamma=0.1, relative=False),
            "adapter": LoraConfig(r=5),
            "max_per_epoch": 1,
            "tolerance": None,
            "history": "paper",
        }
        return cls(**{**settings, **overrides})

    def __repr__(self) -> str:
        settings = {
            "trigger": getattr(self.trigger, "__name__", repr(self.trigger)),
            "objective": self._teleporter.objective,
            "search": self._teleporter.search,
            "adapter": _changed_fields(self._teleporter.adapter),
            "schedule": self.schedule,
            "tolerance": self._teleporter.tolerance,
            "invariance": self._teleporter.invariance,
            "num_batches": self.num_batches,
            "history": self._history.mode,
            "seed": self._seed,
            "check_ranks": self.check_ranks,
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())})"

    def __getstate__(self) -> dict[str, Any]:
        # A pickled generator does not survive on its way to the processes that `ddp_spawn` starts.
        return {**self.__dict__, "_generator": bytes(self._generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(torch.tensor(list(state["_generator"]), dtype=torch.uint8))

    def should_check(self, trainer: Trainer, pl_module: MultiTaskMixin) -> bool:
        """Whether to check the trigger at the coming optimizer step. Override it for a schedule of your own.

        Called once before the first batch of each optimizer step.
        """
        return self.schedule.due(trainer.current_epoch, trainer.global_step, self._epoch.tried)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported before training starts."""
        if stage != "fit":
            return
        # Epochs and batches of an earlier fit are not those of this one. A checkpoint is loaded after this.
        self._epoch = _EpochCounts()
        self._recent, self._recent_state = [], []
        self._warned = False
        if not isinstance(pl_module, MultiTaskMixin):
            raise MisconfigurationException(
                f"SymmetryTeleportCallback needs a module that subclasses MultiTaskMixin; {type(pl_module).__name__}"
                " does not. Write `class YourModule(MultiTaskMixin, LightningModule)` and its `task_losses`."
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"SymmetryTeleportCallback needs automatic optimization; {type(pl_module).__name__} sets"
                " `automatic_optimization = False`."
            )
        check_strategy(trainer)
        # Modules may build their layers in these hooks, which run later; `on_fit_start` checks again.
        if not (is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)):
            self._check_reach(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer, and hook historical trajectory reuse into its step."""
        assert isinstance(pl_module, MultiTaskMixin)
        self._check_reach(pl_module)
        optimizer = check_optimizer(pl_module)
        try:
            self._history.check(optimizer)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if type(self).should_check is SymmetryTeleportCallback.should_check:
            self._warn_if_never_due(trainer)
        self._due = None
        keep_what_compiled_code_saves()
        pl_module.discard_step()
        self._remove_hook()
        self._hook = optimizer.register_step_pre_hook(self._history.pre_step_hook)
        self._ranks = Ranks.of(pl_module)
        # Those of another number of processes would be the batches of somebody else.
        if len(self._recent_state) == self._ranks.size:
            states = self._recent_state[self._ranks.rank]
            self._recent = [RecordedBatch.from_state_dict(state, pl_module.device) for state in states]
        self._recent_state = []

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizer as it was, and hold no memory."""
        self._remove_hook()
        self._teleporter.clear()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the task gradients of the coming optimizer step if a check is due."""
        assert isinstance(pl_module, MultiTaskMixin)
        # Not in `on_train_epoch_start`, which Lightning skips for the epoch after a checkpoint of its last batch.
        if self._epoch.epoch != trainer.current_epoch:
            self._epoch = _EpochCounts(epoch=trainer.current_epoch)
            self._due = None
        if self._due is None:
            self._due = self.should_check(trainer, pl_module)
            if type(self).should_check is not SymmetryTeleportCallback.should_check:
                self._due = self._ranks.decide(self._due)
        if self._due:
            pl_module.request_task_gradients()
        if self._due or self.num_batches > 1:
            pl_module.record_batches()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the tasks at the first step, long before the first conflict may need them."""
        assert isinstance(pl_module, MultiTaskMixin)
        if len(pl_module.task_names) < 2:
            names = ", ".join(map(repr, pl_module.task_names)) or "nothing, since it was never called"
            raise MisconfigurationException(
                f"SymmetryTeleportCallback needs at least 2 tasks; `task_losses` returned {names}. Remove the callback"
                " to train a single task, and do not override `training_step` without calling `super()`."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the trigger, and teleport if it fires."""
        assert isinstance(pl_module, MultiTaskMixin)
        due, self._due = self._due, None
        self._history.disarm()
        window = pl_module.recorded_batches
        batches = [*self._recent, *window][-max(self.num_batches, len(window)) :]
        # Without a batch in the window, `training_step` returned None and there is nothing to step on.
        if due and window:
            self._check(trainer, pl_module, optimizer, window, batches)
        self._recent = batches[1 - self.num_batches :] if self.num_batches > 1 else []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the counts of the epoch."""
        if self._epoch.checks:
            pl_module.log_dict(
                {
                    "cost/conflict_share": self._epoch.conflicts / self._epoch.checks,
                    "cost/accepted": float(self._epoch.accepted),
                    "cost/rejected": float(self._epoch.tried - self._epoch.accepted),
                }
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """The reports, the counts of the epoch, the state of the random numbers, and the batches that are held.

        Traces are left out: with a teleport at every step, they would outgrow the model.
        """
        return {
            "reports": [asdict(replace(report, trace=[])) for report in self.reports],
            "epoch": asdict(self._epoch),
            "generator": self._generator.get_state(),
            "recent": self._ranks.gather([record.state_dict() for record in self._recent])
            if self.num_batches > 1
            else [],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.reports = [TeleportReport(**report) for report in state_dict["reports"]]
        self._epoch = _EpochCounts(**state_dict["epoch"])
        self._generator.set_state(state_dict["generator"].cpu())
        self._recent_state = state_dict["recent"]

    def _check(
        self,
        trainer: Trainer,
        module: MultiTaskMixin,
        optimizer: Optimizer,
        window: Sequence[RecordedBatch],
        batches: Sequence[RecordedBatch],
    ) -> None:
        gradients = module.task_gradients
        assert gradients is not None
        if gradient_scaler(trainer) is not None and not (gradients.is_finite and grads_are_finite(module)):
            return  # The scaler is going to skip this step.
        self._epoch.checks += 1
        if not self._ranks.decide(self.trigger(gradients)):
            return
        self._epoch.conflicts += 1
        self._epoch.tried += 1
        report = self._teleport(trainer, module, optimizer, gradients, window, batches)
        self.reports.append(report)
        if report.accepted:
            self._epoch.accepted += 1
            module.log_dict(
                {
                    "cost/drift": report.drift,
                    "cost/cosine_before": min(report.cosines_before.values()),
                    "cost/cosine_after": min(report.cosines_after.values()),
                },
                on_step=False,
                on_epoch=True,
                batch_size=1,
            )

    def _teleport(
        self,
        trainer: Trainer,
        module: MultiTaskMixin,
        optimizer: Optimizer,
        gradients: TaskGradients,
        window: Sequence[RecordedBatch],
        batches: Sequence[RecordedBatch],
    ) -> TeleportReport:
        began = time.perf_counter()
        update = Landscape(module, window, self._generator)
        held = update if len(batches) == len(window) else Landscape(module, batches, self._generator)
        # Lightning divides by the full number of micro-batches even where the last window of an epoch has fewer.
        share = len(window) / trainer.accumulate_grad_batches
        if share != 1:
            gradients = TaskGradients(gradients.names, gradients.matrix / share)
        losses = self._ranks.mean_(torch.stack([record.losses for record in window]).mean(dim=0))
        start = Point(losses, gradients)

        def effort() -> dict[str, Any]:
            landscapes = {id(landscape): landscape for landscape in (held, update)}.values()
            return {
                "seconds": time.perf_counter() - began,
                "forwards": sum(landscape.forwards for landscape in landscapes),
                "backwards": sum(landscape.backwards for landscape in landscapes),
                "trace": self._teleporter.trace,
            }

        def report(outcome: Outcome) -> TeleportReport:
            before, after, names = outcome.start, outcome.end, gradients.names
            return TeleportReport(
                step=trainer.global_step,
                epoch=trainer.current_epoch,
                accepted=outcome.accepted,
                reason=outcome.reason,
                losses_before=_by_task(names, before.losses),
                losses_after=_by_task(names, after.losses),
                cosines_before=_by_task(names, before.gradients.cosines),
                cosines_after=_by_task(names, after.gradients.cosines),
                grad_norm_before=float(before.gradients.mean_norm),
                grad_norm_after=float(after.gradients.mean_norm),
                sigma=outcome.sigma,
                drift=drift(after.losses, before.losses, self._teleporter.invariance),
                **effort(),
            )

        outcome = None
        # Memory that runs out during a teleport may still be missing when it is reported.
        unmoved = report(Outcome(False, "", start, start, 0.0, None, lambda: None))
        try:
            with torch.enable_grad(), without_trace(module), StageDisplay(trainer) as display:
                outcome = self._teleporter.run(
                    held,
                    update,
                    start if held is update else None,
                    module.shared_modules(),
                    _learning_rate(optimizer, module),
                    display,
                )
            finished = report(outcome)
            if outcome.update is not None:
                if share != 1:
                    update.scale(outcome.update, share)
                if self.check_ranks:
                    self._ranks.check_equal(update.shared)
        except BaseException as error:
            if outcome is not None:
                outcome.undo()
            reason = f"{type(error).__name__}: {error}"
            self.reports.append(replace(unmoved, reason=reason, **effort()))
            raise
        if outcome.update is not None:
            self._history.arm(outcome.sigma, update.shared)
            self._teleporter.recycle(module.exchange_task_gradients(outcome.update))
        return finished

    def _warn_if_never_due(self, trainer: Trainer) -> None:
        start, epochs = self.schedule.start_epoch, trainer.max_epochs
        if epochs is not None and 0 < epochs <= start:
            rank_zero_warn(
                f"`start_epoch={start}` is never reached: epochs count from 0 and `max_epochs={epochs}`. There will be"
                " no teleport. Lower `start_epoch`, or train for longer."
            )

    def _check_reach(self, module: MultiTaskMixin) -> None:
        search, adapter = self._teleporter.search, self._teleporter.adapter
        modules, shared = module.shared_modules(), module.shared_parameters()
        try:
            reached = search.reach(modules, shared, adapter)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        share = num_elements(reached) / num_elements(shared)
        missing = left_out(modules, shared, adapter, reached)
        if not self._warned and (missing or share < 0.5):
            self._warned = True
            rank_zero_warn(
                f"Teleports take steps in {share:.0%} of the shared parameters: {search!r} with"
                f" {type(adapter).__name__} leaves out {', '.join(missing) or 'all that are no matrices'}."
            )

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


@dataclass
class _EpochCounts:
    epoch: int = -1
    checks: int = 0
    conflicts: int = 0
    tried: int = 0
    accepted: int = 0


def _objective(value: ObjectiveName | Objective) -> Objective:
    if isinstance(value, Objective):
        return value
    if value not in _OBJECTIVES:
        raise ValueError(f"`objective` must be one of {list(_OBJECTIVES)} or an Objective; got {value!r}.")
    return _OBJECTIVES[value]()


def _search(value: SearchName | Search) -> Search:
    if isinstance(value, Search):
        return value
    if value not in _SEARCHES:
        raise ValueError(f"`search` must be one of {list(_SEARCHES)} or a Search; got {value!r}.")
    return _SEARCHES[value]()


def _changed_fields(config: PeftConfig) -> str:
    """A configuration without the dozens of fields that have their default."""
    default = type(config)().to_dict()
    changed = {
        # The order of a set differs between processes.
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if value != default.get(name)
    }
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"


def _by_task(names: Sequence[str], values: Tensor) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _learning_rate(optimizer: Optimizer, module: MultiTaskMixin) -> float:
    """The learning rate of the first shared parameter that the optimizer updates."""
    shared = {id(parameter) for parameter in module.shared_parameters()}
    for group in optimizer.param_groups:
        if any(id(parameter) in shared for parameter in group["params"]):
            return float(group["lr"])
    raise MisconfigurationException(
        "The optimizer updates none of the shared parameters. Pass them to it in `configure_optimizers`."
    )
