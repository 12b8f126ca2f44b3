"""Symmetry teleportation as a Lightning callback."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from peft import LoraConfig
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cost._arguments import as_bool, check_bool, check_choice, check_function, check_seed
from lightning_cost._lightning.checks import (
    allow_repeated_backward,
    check_automatic_optimization,
    check_optimizer,
    check_strategy,
    gradient_scaler,
)
from lightning_cost._teleport.choices import ObjectiveName, SearchName, choose_objective, choose_search
from lightning_cost._teleport.fit import UNREPEATABLE, FitTeleports, RepeatCheck, Unrepeatable, check_reach
from lightning_cost._teleport.optimizer_state import History, HistoryReuse
from lightning_cost._teleport.report import EpochCounts, TeleportReport, fill_in, without_traces
from lightning_cost._teleport.run import Teleporter
from lightning_cost._training.engine import Engine
from lightning_cost._training.evaluate import grads_are_finite
from lightning_cost._training.step import Window
from lightning_cost.invariance import Invariance
from lightning_cost.mixin import MultiTaskMixin, check_is_multi_task
from lightning_cost.objectives import Objective, SampledSharpness
from lightning_cost.searches import PenaltySearch, Search
from lightning_cost.triggers import TRIGGERS, DominatedConflict, Schedule, Trigger, TriggerName

__all__ = ["SymmetryTeleportCallback"]


class SymmetryTeleportCallback(Callback):
    r"""Teleports the shared module, when its tasks conflict, to a point with the same losses and less conflict (COST).

    Add it to the Trainer of any :class:`~lightning_cost.mixin.MultiTaskMixin`. Before an optimizer step it checks the
    trigger on the task gradients. If it fires, the callback searches for a change of the shared weights that leaves the
    task losses on the batch as they are and lessens the conflict. If there is one, the weights move there. The step
    then goes on with the task gradients of the new point, by whatever multi-task method the module uses. A teleport
    that fails changes nothing. Without the callback, the module trains with its method alone.

    The defaults are what worked best in experiments, not what the paper does. :meth:`paper` gives its settings.

    Args:
        trigger: When to teleport. ``"dominated"``: the task with the smallest gradient conflicts with the mean (Eq. 3).
            ``"majority"``: at least half of the tasks do (Eq. 4). ``"any"``: any does. ``"weak"``: any two tasks
            conflict. Or a function from :class:`~lightning_cost.gradients.TaskGradients` to a bool.
        objective: What to increase: ``"conflict"`` (:class:`~lightning_cost.objectives.ConflictAlignment`),
            ``"sharpness"`` (:class:`~lightning_cost.objectives.SampledSharpness`, Eq. 8 to 10), ``"gradient_norm"``
            (:class:`~lightning_cost.objectives.GradientNorm`), or an objective.
        search: How to get there: ``"level_set"`` (:class:`~lightning_cost.searches.LevelSetSearch`), ``"penalty"``
            (:class:`~lightning_cost.searches.PenaltySearch`, Eq. 11), or a search.
        start_epoch: First epoch with checks, counted from 0.
        max_per_epoch: Most teleports tried in an epoch; ``None`` for no limit.
        check_every_n_steps: Check the trigger at every n-th optimizer step.
        tolerance: Largest accepted relative change of a task loss on the batch. ``None`` accepts every finite result,
            as the paper does.
        reevaluate: Whether to evaluate the task gradients at the new point, accept it only if the objective has grown,
            and update with them. ``False`` is the *deferred* mode, for a third of the price: a new point is accepted by
            its losses, the update takes the gradients at hand, and the next check tells what became of the conflict.
            ``"level_set"`` then stands for ``LevelSetSearch(full_rank=True, backtracks=1, shrink=None)``, and
            ``"conflict"`` for ``ConflictAlignment(terms="mean")``.
        invariance: What the tolerance holds for: the loss of each task (``"per_task"``) or their ``"mean"``.
        history: What the optimizer keeps of its history: ``"keep"`` all, ``"paper"`` as much as Eq. 12 and 13 say,
            ``"momentum"`` the same but only for the first moment, ``"reset"`` nothing.
        unrepeatable: What to do where ``task_losses`` does not return the same losses again: ``"raise"`` an error, or
            ``"skip"`` the teleport with a warning. It is looked at in the first teleport and now and then, at the price
            of a forward pass.
        seed: Seed of the random numbers of the search. Those of the training loop are never touched.
        check_ranks: Whether to compare the shared parameters of all DDP processes after each teleport, by their
            checksums, and to stop if they differ. It costs next to nothing.

    Attributes:
        reports: A :class:`~lightning_cost.TeleportReport` for each teleport that was tried.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup`` or ``on_fit_start``, if the Trainer or the module is not supported.

    Example::

        class LitModel(MultiTaskMixin, LightningModule): ...


        teleport = SymmetryTeleportCallback()
        trainer = Trainer(callbacks=[teleport])
        trainer.fit(LitModel(), datamodule=...)
        print(sum(report.accepted for report in teleport.reports))

    Once an epoch it logs ``cost/conflict_share`` (share of the checks that found conflict), the counts
    ``cost/accepted`` and ``cost/rejected``, and the means over the accepted teleports of ``cost/drift``,
    ``cost/cosine_before`` and ``cost/cosine_after`` (the smallest cosine of a task with the mean). ``reports`` has them
    one by one.
    """

    def __init__(
        self,
        trigger: TriggerName | Trigger = "dominated",
        objective: ObjectiveName | Objective = "conflict",
        search: SearchName | Search = "level_set",
        start_epoch: int = 1,
        max_per_epoch: int | None = None,
        check_every_n_steps: int = 1,
        tolerance: float | None = 0.02,
        reevaluate: bool = True,
        invariance: Invariance = "per_task",
        history: History = "keep",
        unrepeatable: Unrepeatable = "raise",
        seed: int = 0,
        check_ranks: bool = True,
    ) -> None:
        super().__init__()
        if not callable(trigger):
            check_choice("trigger", trigger, TRIGGERS, "a function of TaskGradients")
        check_bool("reevaluate", reevaluate)
        chosen_objective, chosen_search = choose_objective(objective, reevaluate), choose_search(search, reevaluate)
        check_function("trigger", trigger, "a function of TaskGradients")
        check_choice("unrepeatable", unrepeatable, UNREPEATABLE)
        check_seed("seed", seed)
        check_bool("check_ranks", check_ranks)
        self.trigger: Trigger = trigger if callable(trigger) else TRIGGERS[trigger]
        self.schedule = Schedule(start_epoch, max_per_epoch, check_every_n_steps)
        self.check_ranks = check_ranks
        self.reports: list[TeleportReport] = []
        self._teleporter = Teleporter(chosen_objective, chosen_search, invariance, tolerance, reevaluate)
        self._history = HistoryReuse(history)
        self._repeats = RepeatCheck(unrepeatable)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = EpochCounts()
        self._asked: Window | None = None
        self._due = False
        self._lazy_checks = 0
        self._fit: FitTeleports | None = None
        self._warned = False

    @classmethod
    def paper(cls, **overrides: Any) -> SymmetryTeleportCallback:
        """Algorithm 1 with the settings of the paper. What it leaves open is decided here.

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
            "search": PenaltySearch(adapter=LoraConfig(r=5), gamma=0.1, relative=False),
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
            "schedule": self.schedule,
            "tolerance": self._teleporter.tolerance,
            "reevaluate": self._teleporter.reevaluate,
            "invariance": self._teleporter.invariance,
            "history": self._history.mode,
            "unrepeatable": self._repeats.unrepeatable,
            "seed": self._seed,
            "check_ranks": self.check_ranks,
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())})"

    def __getstate__(self) -> dict[str, Any]:
        # `ddp_spawn` pickles the callback, and a pickled generator does not arrive in the other process.
        return {**self.__dict__, "_fit": None, "_generator": bytes(self._generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(torch.tensor(list(state["_generator"]), dtype=torch.uint8))

    def should_check(self, trainer: Trainer, pl_module: MultiTaskMixin) -> bool:
        """Whether to check the trigger at the coming optimizer step. Override it for a schedule of your own.

        It is called once, before the first batch of each optimizer step.
        """
        return self.schedule.due(trainer.current_epoch, trainer.global_step, self._epoch.tried)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported before training starts."""
        if stage != "fit":
            return
        # Reset here: Lightning loads a checkpoint later, which sets the counts.
        self._epoch = EpochCounts()
        self._repeats.teleports_left = 0
        self._asked, self._warned = None, False
        check_is_multi_task(pl_module, type(trainer), "SymmetryTeleportCallback")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, SymmetryTeleportCallback)]
        if len(others) > 1:
            names = " and ".join(type(other).__name__ for other in others)
            raise MisconfigurationException(
                f"A Trainer can have one SymmetryTeleportCallback; got {len(others)}: {names}. Remove all but one. To"
                " combine triggers, write a trigger of your own."
            )
        check_automatic_optimization(pl_module, "SymmetryTeleportCallback")
        check_strategy(trainer)
        # A module may build its layers in these hooks, which run later. `on_fit_start` checks again.
        if not (is_overridden("configure_model", pl_module) or is_overridden("setup", pl_module)):
            self._check_reach(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the optimizer, and hook historical trajectory reuse into its step."""
        self._check_reach(pl_module)
        optimizer = check_optimizer(pl_module)
        self._history.check(optimizer)
        start, epochs = self.schedule.start_epoch, trainer.max_epochs
        own_schedule = type(self).should_check is not SymmetryTeleportCallback.should_check
        if not own_schedule and epochs is not None and 0 < epochs <= start:
            rank_zero_warn(
                f"`start_epoch={start}` is never reached: epochs count from 0 and `max_epochs={epochs}`. There will be"
                " no teleport. Lower `start_epoch`, or train for longer."
            )
        if own_schedule and self.schedule != Schedule() and not self._reads_schedule():
            rank_zero_warn(
                f"{type(self).__name__} overrides `should_check` without `super().should_check(...)` or"
                f" `self.schedule`, so that {self.schedule} has no effect. Remove `start_epoch`, `max_per_epoch` and"
                " `check_every_n_steps`, or read them in `should_check`."
            )
        allow_repeated_backward()
        self._end_fit()
        self._fit = FitTeleports(
            self._teleporter,
            self._history,
            optimizer,
            pl_module,
            self._generator,
            self.check_ranks,
            self._repeats,
        )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizer as it was, and hold no memory."""
        self._end_fit()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizer as it was, and hold no memory. Lightning does not call ``teardown`` now."""
        self._end_fit()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the task gradients of the coming optimizer step if a check is due."""
        assert isinstance(pl_module, MultiTaskMixin)
        if self._fit is None:
            raise MisconfigurationException(
                f"{type(self).__name__}.on_fit_start did not call `super().on_fit_start(trainer, pl_module)`."
            )
        # Not in `on_train_epoch_start`: Lightning skips it after a checkpoint from the last batch of an epoch.
        if self._epoch.epoch != trainer.current_epoch:
            self._epoch = EpochCounts(epoch=trainer.current_epoch)
        engine = Engine(pl_module)
        if self._asked != engine.window:
            self._asked, self._due = engine.window, as_bool("should_check", self.should_check(trainer, pl_module))
            if type(self).should_check is not SymmetryTeleportCallback.should_check:
                self._due = self._fit.ranks.decide(self._due)
        if self._due:
            every = self.trigger.all_tasks_every if isinstance(self.trigger, DominatedConflict) else 1
            engine.request(batches=True, lazily=self._lazy_checks < every - 1)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the tasks at the first step, long before the first conflict may need them."""
        tasks = Engine(pl_module).names
        if len(tasks) < 2:
            names = ", ".join(map(repr, tasks)) or "nothing, since it was never called"
            raise MisconfigurationException(
                f"SymmetryTeleportCallback needs at least 2 tasks; `task_losses` returned {names}. Remove the callback"
                " to train a single task, and do not override `training_step` without calling `super()`. For a task"
                " without labels in this batch, return None."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the trigger, and teleport if it fires."""
        assert self._fit is not None
        self._history.disarm()
        engine = Engine(pl_module)
        step = engine.step
        rows = None if step is None else step.collected
        # Without batches, `training_step` returned None for all of them, and there is nothing to step on.
        if not self._due or step is None or not step.batches or rows is None or rows.gradients is None:
            return
        if not all(parameter.requires_grad for parameter in rows.shared):
            return  # Somebody has frozen parameters between two micro-batches.
        if gradient_scaler(trainer) is not None and not (
            rows.gradients.is_finite and grads_are_finite(pl_module.parameters())
        ):
            return  # The scaler is going to skip this step.
        self._check_edits(pl_module, by_norm=False)
        self._epoch.checks += 1
        if step.accumulator is None:
            self._lazy_checks += 1
            if not self._fit.ranks.decide(engine.conflicts()):
                return
            engine.expand()
        self._lazy_checks = 0
        assert step.gradients is not None
        if not step.gradients.is_finite:
            return  # Rows may overflow under a gradient scaler, although their sum does not.
        found = step.gradients.with_gradient
        known = fill_in(self.reports, found, trainer.global_step)
        if known is not None:
            self._epoch.count_after(known)
        # A single task conflicts with none.
        if len(found.names) < 2 or not self._fit.ranks.decide(as_bool("trigger", self.trigger(found))):
            return
        self._check_edits(pl_module, by_norm=True)
        self._epoch.conflicts += 1
        self._epoch.tried += 1
        self._epoch.count(self._fit.teleport(trainer, self.reports))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what happened in the epoch. All processes log the same."""
        pl_module.log_dict(self._epoch.figures(), sync_dist=trainer.world_size > 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The reports without their traces, the counts of the epoch, and the state of the random numbers."""
        return {
            "reports": without_traces(self.reports),
            "epoch": asdict(self._epoch),
            "lazy_checks": self._lazy_checks,
            "teleports_left": self._repeats.teleports_left,
            "generator": self._generator.get_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.reports = [TeleportReport(**report) for report in state_dict["reports"]]
        self._epoch = EpochCounts(**state_dict["epoch"])
        self._lazy_checks = state_dict["lazy_checks"]
        self._repeats.teleports_left = state_dict["teleports_left"]
        self._generator.set_state(state_dict["generator"].cpu())

    def _reads_schedule(self) -> bool:
        """Whether an overridden :meth:`should_check` names what it would read the schedule by."""
        code = getattr(type(self).should_check, "__code__", None)
        return code is None or not {"should_check", "schedule"}.isdisjoint(code.co_names)

    def _check_edits(self, module: LightningModule, by_norm: bool) -> None:
        edited = Engine(module).edited_parameter(by_norm) if self._teleporter.reevaluate else None
        if edited is not None:
            raise MisconfigurationException(
                f"`.grad` of `{edited}` was edited after the backward pass, and before {type(self).__name__} looks at"
                " it. A teleport computes `.grad` anew, so the edit would be lost. Edit gradients in"
                " `on_before_optimizer_step`: of the module, after `super()`, or of a callback that comes after this"
                " one."
            )

    def _check_reach(self, module: LightningModule) -> None:
        message = check_reach(self._teleporter.search, module)
        if message and not self._warned:
            self._warned = True
            rank_zero_warn(message)

    def _end_fit(self) -> None:
        if self._fit is not None:
            self._fit.close()
            self._fit = None
