"""How much the tasks of a module conflict, measured beside its training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cost._arguments import check_bool, check_instance, check_integer
from lightning_cost._lightning.checks import check_automatic_optimization, check_strategy
from lightning_cost._training.engine import Engine
from lightning_cost._training.step import Window
from lightning_cost.gradients import TaskGradients
from lightning_cost.mixin import check_is_multi_task
from lightning_cost.triggers import dominated_conflict

__all__ = ["ConflictMonitor", "ConflictSummary"]


@dataclass(frozen=True)
class ConflictSummary:
    r"""What a :class:`ConflictMonitor` has measured: means and shares over the steps in which a task had a gradient.

    ``rich.print(summary)`` shows it as a table, and :func:`~lightning_cost.plots.conflict_heat_map` as a figure.

    Attributes:
        steps: Number of steps that were measured.
        skipped: Number of steps that were due, but had fewer than two tasks with a gradient, or gradients whose inner
            products were not finite.
        norms: Mean norm :math:`\|g_i\|` by task.
        cosines: Mean cosine :math:`\cos \phi_{i0}` with the mean gradient, by task.
        conflicts: By task, the share of the steps in which it conflicts with the mean (Definition 1).
        pairwise_cosines: Mean cosine :math:`\cos \phi_{ij}` by two tasks, in the order of ``norms``.
        pairwise_conflicts: By two tasks, the share of the steps in which they conflict (weak conflict, Definition 1).
        dominated: Share of the steps in which the task with the smallest gradient conflicts with the mean (Eq. 3).
        weak: Share of the steps in which any two tasks conflict.
        mean_norm: Mean norm :math:`\|g_0\|` of the mean gradient.
        pareto_stationarity: Mean of
            :attr:`~lightning_cost.gradients.TaskGradients.pareto_stationarity`.
    """

    steps: int
    skipped: int
    norms: dict[str, float]
    cosines: dict[str, float]
    conflicts: dict[str, float]
    pairwise_cosines: dict[tuple[str, str], float]
    pairwise_conflicts: dict[tuple[str, str], float]
    dominated: float
    weak: float
    mean_norm: float
    pareto_stationarity: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A row for each task, and what holds for all of them below."""

        def shown(task: str) -> Text:
            # Not a string: rich would read markup in it. A terminal may lack the letters of a name.
            return Text(task.encode(console.encoding, "backslashreplace").decode(console.encoding))

        table = Table(title=f"Conflict in {self.steps} steps", caption_justify="left")
        table.add_column("task")
        for title in ("gradient norm", "cosine with the mean", "conflicts with the mean"):
            table.add_column(title, justify="right")
        table.add_column("conflicts most with")
        for task, norm in self.norms.items():
            others = {
                other: share
                for pair, share in self.pairwise_conflicts.items()
                if task in pair
                for other in pair
                if other != task
            }
            worst = max(others, key=others.__getitem__, default=None)
            table.add_row(
                shown(task),
                f"{norm:.3g}",
                f"{self.cosines[task]:+.2f}",
                f"{self.conflicts[task]:.0%}",
                "" if worst is None or not others[worst] else shown(f"{worst} ({others[worst]:.0%})"),
            )
        table.caption = (
            f"The task with the smallest gradient conflicts with the mean (Eq. 3) in {self.dominated:.0%} of the steps,"
            f" and any two tasks in {self.weak:.0%}. Norm of the mean gradient {self.mean_norm:.3g}, Pareto"
            f" stationarity {self.pareto_stationarity:.3g}."
        )
        yield table


@dataclass
class _Mean:
    """Sum and number of the values of a figure."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass
class _Sums:
    """What the steps so far add up to. Keys are names of figures, tasks, and two tasks."""

    steps: int = 0
    skipped: int = 0
    means: dict[tuple[str, ...], _Mean] = field(default_factory=dict)

    def add(self, name: str, value: float, *tasks: str) -> None:
        key = (name, *tasks)
        # Another fit may have the tasks in another order.
        turned = (name, *tasks[::-1])
        self.means.setdefault(turned if turned in self.means else key, _Mean()).add(value)

    def by_task(self, name: str) -> dict[str, float]:
        return {key[1]: mean.value for key, mean in self.means.items() if key[0] == name}

    def by_pair(self, name: str) -> dict[tuple[str, str], float]:
        return {(key[1], key[2]): mean.value for key, mean in self.means.items() if key[0] == name}

    def overall(self, name: str) -> float:
        return self.means.get((name,), _Mean()).value


class ConflictMonitor(Callback):
    """Measures how much the tasks conflict, beside the training.

    Add it to the Trainer of any :class:`~lightning_cost.mixin.MultiTaskMixin`, to see whether there is a conflict
    before you treat it. Every n-th step it looks at the task gradients. If the step does not compute them anyway, that
    takes a backward pass for each task.

    These passes leave parameters, ``.grad``, buffers, random numbers and ``task_gradients`` of the module as they are,
    so the run is the run without the monitor. Only what you hook into backward passes yourself runs more often.

    To the loggers of the Trainer it writes, at each measured step, for each task ``conflict/norm/<task>`` and
    ``conflict/cosine/<task>`` (with the mean gradient), and ``conflict/smallest_pairwise_cosine``,
    ``conflict/mean_norm`` and ``conflict/pareto_stationarity``. At the end of the fit it prints a table.

    Put it before a :class:`~lightning_cost.callback.SymmetryTeleportCallback` to see the conflict before teleports, and
    after it to see what they leave. To see both, add two of them with different names.

    Args:
        every_n_steps: Measure at every n-th optimizer step.
        table: Whether to print the table.
        name: What the names of the logged figures begin with.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup``, if the Trainer or the module is not supported.
        RuntimeError: In the first measured step, if reentrant activation checkpointing hides the shared parameters.

    Example::

        monitor = ConflictMonitor(every_n_steps=20)
        trainer = Trainer(callbacks=[monitor])
        trainer.fit(LitModel(), datamodule=...)
        print(monitor.summary.dominated)
    """

    def __init__(self, every_n_steps: int = 10, table: bool = True, name: str = "conflict") -> None:
        super().__init__()
        check_integer("every_n_steps", every_n_steps, 1)
        check_bool("table", table)
        check_instance("name", name, str, "a string")
        self.every_n_steps = every_n_steps
        self.table = table
        self.name = name
        self._sums = _Sums()
        self._asked: Window | None = None
        self._due = False

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep the sums. A Trainer refuses two monitors with the same name."""
        return self._generate_state_key(name=self.name)

    @property
    def summary(self) -> ConflictSummary:
        """What was measured so far, in all fits of this callback. Shares and means of nothing are NaN."""
        sums = self._sums
        return ConflictSummary(
            steps=sums.steps,
            skipped=sums.skipped,
            norms=sums.by_task("norm"),
            cosines=sums.by_task("cosine"),
            conflicts=sums.by_task("conflict"),
            pairwise_cosines=sums.by_pair("pairwise_cosine"),
            pairwise_conflicts=sums.by_pair("pairwise_conflict"),
            dominated=sums.overall("dominated"),
            weak=sums.overall("weak"),
            mean_norm=sums.overall("mean_norm"),
            pareto_stationarity=sums.overall("pareto_stationarity"),
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is not supported before training starts."""
        if stage == "fit":
            self._asked = None
            check_is_multi_task(pl_module, type(trainer), "ConflictMonitor")
            check_automatic_optimization(pl_module, "ConflictMonitor")
            check_strategy(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the task gradients of the coming optimizer step if it is due."""
        engine = Engine(pl_module)
        if self._asked != engine.window:
            self._asked, self._due = engine.window, trainer.global_step % self.every_n_steps == 0
        if self._due:
            engine.watch()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, and write to the loggers."""
        if not self._due:
            return
        # A window of micro-batches has one step.
        self._due = False
        gradients = Engine(pl_module).watched
        found = gradients.with_gradient if gradients is not None and gradients.is_finite else None
        if found is None or len(found.names) < 2:
            self._sums.skipped += 1
            return
        figures = self._measure(found)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first process."""
        sums = self._sums
        if sums.skipped and not sums.steps:
            rank_zero_warn(
                f"ConflictMonitor has measured nothing: none of the {sums.skipped} steps that it looked at had two"
                " tasks with a gradient of the shared parameters that is finite. The tasks are"
                f" {', '.join(map(repr, Engine(pl_module).names))}."
            )
        if self.table and trainer.is_global_zero:
            console = Console()
            if self.name != "conflict":
                console.print(Text(self.name))
            console.print(self.summary)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return asdict(self._sums)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        means = {tuple(key): _Mean(**mean) for key, mean in state_dict["means"].items()}
        self._sums = _Sums(state_dict["steps"], state_dict["skipped"], means)

    def _measure(self, gradients: TaskGradients) -> dict[str, float]:
        """Add the figures of a step to the sums. Returns those for the loggers."""
        sums, names = self._sums, gradients.names
        sums.steps += 1
        figures: dict[str, float] = {}
        per_task = (gradients.norms.tolist(), gradients.cosines.tolist(), gradients.conflicts)
        for name, norm, cosine, conflict in zip(names, *per_task, strict=True):
            sums.add("norm", norm, name)
            sums.add("cosine", cosine, name)
            sums.add("conflict", conflict, name)
            figures |= {f"{self.name}/norm/{name}": norm, f"{self.name}/cosine/{name}": cosine}
        pairwise = gradients.pairwise_cosines.tolist()
        smallest = 1.0
        for i, j in combinations(range(len(names)), 2):
            smallest = min(smallest, pairwise[i][j])
            sums.add("pairwise_cosine", pairwise[i][j], names[i], names[j])
            sums.add("pairwise_conflict", pairwise[i][j] < 0, names[i], names[j])
        overall = {
            "mean_norm": gradients.mean_norm.item(),
            "pareto_stationarity": gradients.pareto_stationarity.item(),
        }
        for name, value in {"dominated": dominated_conflict(gradients), "weak": smallest < 0, **overall}.items():
            sums.add(name, value)
        figures |= {f"{self.name}/{name}": value for name, value in overall.items()}
        return {**figures, f"{self.name}/smallest_pairwise_cosine": smallest}
