"""What a module keeps from hook to hook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_cost._lightning.recording import RecordedBatch
from lightning_cost._training.accumulator import ExpectedNorms
from lightning_cost._training.late import LateCheck
from lightning_cost._training.method import Method
from lightning_cost._training.method_state import MethodState
from lightning_cost._training.reused import TaskWeights
from lightning_cost._training.step import Step
from lightning_cost.gradients import TaskGradients

__all__: list[str] = []


@dataclass(eq=False)
class Kept:
    """What a module keeps from hook to hook, in the one attribute that it has for the library.

    It does not refer to the module, so that the module is freed as soon as nobody needs it.

    Attributes:
        names: The tasks, in the order of the first step; empty before it.
        replaying: Whether ``task_losses`` is being evaluated again.
        ignored_by_ddp: Names that DDP shall ignore, as the module's user has set them.
        expected: What is known of the norms of the task gradients.
        method: How ``mtl_method`` is used.
        options: What ``mtl_method`` was last asked for: features, and weights.
        task_weights: The task weights of an aggregator, for the steps that reuse them.
        features: The outputs of the shared modules in the last evaluation, until it is scalarized.
        checked_features: Whether all losses were seen to reach the shared parameters through these only.
        method_state: Its state across epochs, fits and checkpoints.
        step: The optimizer step under way; ``None`` outside of one.
        coming: The step after it, which collects requests.
        gradients: The task gradients of the last step.
        comparison: For a method that compares losses: the batches, and their losses before the optimizer step.
        comparisons: Number of these comparisons in this fit.
        clones_batches: Whether recorded batches get tensors of their own, since ``task_losses`` changes them in place.
        written: Frozen parameters that ``task_losses`` writes; ``None`` before it was looked at.
        late: Losses that nobody has looked at yet.
        matrix: A matrix of task gradients whose memory the next step may reuse.
        pair_matrix: The same for a step with a pair.
        hook: The hook in the optimizer.
        prepared: The method that is ready for this fit.
        tried: The method and the tasks that were last found to fit together.
        warned_of_hooks: Whether a warning of hooks that edit ``.grad`` has been given.
    """

    names: tuple[str, ...] = ()
    replaying: bool = False
    ignored_by_ddp: tuple[str, ...] = ()
    expected: ExpectedNorms = field(default_factory=ExpectedNorms)
    method: Method = field(default_factory=Method)
    options: tuple[bool, bool] = (False, False)
    task_weights: TaskWeights = field(default_factory=TaskWeights)
    features: list[Tensor] = field(default_factory=list)
    checked_features: bool = False
    method_state: MethodState = field(default_factory=MethodState)
    step: Step | None = None
    coming: Step = field(default_factory=Step)
    gradients: TaskGradients | None = None
    comparison: tuple[list[RecordedBatch], Tensor] | None = None
    comparisons: int = 0
    clones_batches: bool = False
    written: set[Parameter] | None = None
    late: LateCheck | None = None
    matrix: Tensor | None = None
    pair_matrix: Tensor | None = None
    hook: RemovableHandle | None = None
    prepared: Method | None = None
    tried: tuple[Any, tuple[str, ...]] = (None, ())
    warned_of_hooks: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module does not continue this step: its graph cannot be copied, and its hook is the optimizer's.
        left_out = dict.fromkeys(
            ("step", "gradients", "comparison", "late", "matrix", "pair_matrix", "hook", "prepared", "written")
        )
        return {**self.__dict__, **left_out, "features": [], "coming": Step(), "replaying": False, "tried": (None, ())}
