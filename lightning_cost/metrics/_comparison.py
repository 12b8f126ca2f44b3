r"""Metrics that compare multi-task methods: :math:`\Delta m\%` and the mean rank, as functions and as torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cost.metrics._averages import NamedAverages, check_names, check_number
from lightning_cost.metrics._precision import as_real, as_tensor_or_none, at_least_single, check_real

__all__ = ["DeltaM", "MeanRank", "delta_m", "mean_rank"]


def delta_m(values: Tensor, baselines: Tensor | Sequence[float], higher_is_better: Tensor | Sequence[bool]) -> Tensor:
    r"""Mean relative degradation against single-task models, in percent (Eq. 14 of the COST paper).

    .. math:: \Delta m\% = \frac{1}{K} \sum_{k=1}^K (-1)^{\delta_k} \frac{M_k - B_k}{B_k} \times 100

    where :math:`\delta_k` is 1 if a higher value of metric :math:`k` is better, and 0 otherwise. Lower is better. A
    negative result means that the multi-task model is, on average, better than the single-task models.

    Args:
        values: Metrics :math:`M` of the multi-task model, shape :math:`(K,)`, or of several models, shape
            :math:`(\ldots, K)`. Any units, but the same as those of ``baselines``.
        baselines: Metrics :math:`B` of the single-task models, shape :math:`(K,)`. They must be positive, because
            Eq. 14 divides by them. With a negative one, it would count an improvement as a degradation.
        higher_is_better: For each metric, whether a higher value is better, shape :math:`(K,)`.

    Returns:
        Percentages of shape :math:`(\ldots)`, in the precision of ``values``, single or better.

    Raises:
        TypeError: If ``higher_is_better`` holds anything but booleans, or ``values`` is no tensor of real numbers.
        ValueError: If the shapes do not fit, a value is not finite or a baseline is not positive.

    Example:
        CityScapes in the paper: mIoU, pixel accuracy, absolute and relative depth error, of LS and of COST:

        >>> from torch import tensor
        >>> from lightning_cost.metrics import delta_m
        >>> values = tensor([[75.18, 93.49, 0.0155, 46.77], [75.73, 93.53, 0.0133, 31.53]])
        >>> delta_m(values, [74.01, 93.16, 0.0125, 27.77], [True, True, False, False])
        tensor([22.6210,  4.3047])
    """
    check_real("values", values)
    values = at_least_single(values)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(
            f"`values` must have shape (..., metrics) with at least one metric, got {tuple(values.shape)}."
        )
    _check_finite("values", values)
    baselines = as_real("baselines", baselines, values)
    if baselines.shape != values.shape[-1:]:
        raise ValueError(
            f"`baselines` must have one value per metric, shape {tuple(values.shape[-1:])}, "
            f"got {tuple(baselines.shape)}."
        )
    _check_finite("baselines", baselines)
    if not bool((baselines > 0).all()):
        raise ValueError(f"`baselines` must be positive, because Eq. 14 divides by them, got {baselines.tolist()}.")
    higher = _as_directions(higher_is_better, values)
    relative = (values - baselines) / baselines
    return torch.where(higher, -relative, relative).mean(dim=-1) * 100


def mean_rank(values: Tensor, higher_is_better: Tensor | Sequence[bool]) -> Tensor:
    """The rank of each method among the methods, averaged over the metrics ("MR" in the tables of the COST paper).

    Rank 1 is the best. Methods with equal values share the average of their ranks. Ranks ignore how large a difference
    is: two methods that differ in the last digit are as far apart as any other neighbors.

    Args:
        values: Shape (methods, metrics).
        higher_is_better: For each metric, whether a higher value is better, shape (metrics,).

    Returns:
        Mean ranks between 1 and the number of methods, shape (methods,), in the precision of ``values``, single or
        better.

    Raises:
        TypeError: If ``higher_is_better`` holds anything but booleans, or ``values`` is no tensor of real numbers.
        ValueError: If the shapes do not fit or a value is not finite.

    Example:
        >>> from torch import tensor
        >>> from lightning_cost.metrics import mean_rank
        >>> accuracy_and_error = tensor([[0.90, 0.20], [0.80, 0.20], [0.70, 0.10]])
        >>> mean_rank(accuracy_and_error, [True, False])
        tensor([1.7500, 2.2500, 2.0000])
    """
    check_real("values", values)
    values = at_least_single(values)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(
            f"`values` must have shape (methods, metrics) with at least one of each, got {tuple(values.shape)}."
        )
    _check_finite("values", values)
    costs = torch.where(_as_directions(higher_is_better, values), -values, values)
    # Entry [i, j, k] compares method i with method j in metric k.
    mine, rival = costs.unsqueeze(1), costs.unsqueeze(0)
    beaten_by = (rival < mine).sum(dim=1, dtype=values.dtype)
    tied_with = (rival == mine).sum(dim=1, dtype=values.dtype)  # itself included
    return (beaten_by + (tied_with + 1) / 2).mean(dim=1)


class DeltaM(NamedAverages):
    r"""Mean relative degradation against single-task models, in percent (Eq. 14 of the COST paper).

    .. math:: \Delta m\% = \frac{1}{K} \sum_{k=1}^K (-1)^{\delta_k} \frac{M_k - B_k}{B_k} \times 100

    where :math:`M_k` is metric :math:`k` of the multi-task model and :math:`B_k` that of the single-task model.
    :math:`\delta_k` is 1 if a higher value is better, and 0 otherwise. Lower is better. A negative result means that
    the multi-task model is, on average, better than the single-task models.

    One update takes one evaluation of all metrics, such as that of a validation epoch. Several updates are averaged,
    metric by metric. Some benchmarks report the mean of the last 10 epochs: use `torchmetrics.wrappers.Running` for
    that.

    In a distributed run, the evaluations of all processes are averaged. For some metrics, such as mIoU, the mean over
    the shards is not the value of the whole data set. Synchronize such metrics first, and update with their result.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``values`` (mapping of names to numbers or tensors with one element): The metrics, in the units of ``baselines``

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``delta_m`` (`torch.Tensor`): A scalar, in percent

    Args:
        baselines: Values of the single-task models by the name of the metric. They must be positive.
        higher_is_better: For each metric, by the same names, whether a higher value is better.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: If a baseline is not a number or a direction not a boolean; in an update, if a value is not a number.
        ValueError: If the names differ, or a baseline is not positive and finite; in an update, if a value is not
            finite.
        RuntimeError: In ``compute``, if there was no update yet.

    Example:
        >>> from lightning_cost.metrics import DeltaM
        >>> metric = DeltaM({"miou": 0.40, "abs_err": 0.5}, higher_is_better={"miou": True, "abs_err": False})
        >>> metric({"miou": 0.42, "abs_err": 0.6})
        tensor(7.5000)
        >>> metric({"miou": 0.46, "abs_err": 0.5})
        tensor(-7.5000)
        >>> metric.update({"miou": 0.40, "abs_err": 0.8})
        >>> metric.compute()
        tensor(10.)

        The mean of the last two evaluations:

        >>> from torchmetrics.wrappers import Running
        >>> metric = Running(DeltaM({"mae": 2.0}, higher_is_better={"mae": False}), window=2)
        >>> for mae in (4.0, 3.0, 2.5):
        ...     metric.update({"mae": mae})
        >>> metric.compute()
        tensor(37.5000)

        In a LightningModule:

        >>> def on_validation_epoch_end(self):
        ...     self.delta_m.update({"miou": self.miou.compute(), "abs_err": self.abs_err.compute()})
        ...     self.log("val/delta_m", self.delta_m)  # Lightning computes and resets it every epoch
    """

    is_differentiable = True
    higher_is_better = False

    def __init__(
        self, baselines: Mapping[str, Tensor | float], higher_is_better: Mapping[str, bool], **kwargs: Any
    ) -> None:
        super().__init__(1, higher_is_better, **kwargs)
        if not isinstance(baselines, Mapping):
            raise TypeError(f"`baselines` must map each metric's name to its single-task value, got {baselines!r}.")
        check_names("baselines", baselines, self.names)
        self.baselines = {name: _positive(f"baselines[{name!r}]", baselines[name]) for name in self.names}

    def update(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one evaluation of all metrics."""
        self._add(0, values)

    def compute(self) -> Tensor:
        """The percentage of the average over all evaluations since the last reset."""
        if not self.counts.item():
            raise RuntimeError("`DeltaM` has nothing to compute: call `update` with the values of the metrics first.")
        return self._as_result(delta_m(self._averages()[0], list(self.baselines.values()), self._directions))


class MeanRank(NamedAverages):
    """The rank of each method among the methods, averaged over the metrics ("MR" in the tables of the COST paper).

    Rank 1 is the best. Methods with equal averages share the average of their ranks. One update takes one evaluation of
    one method. Several updates of a method, such as seeds, are averaged metric by metric before the ranking.

    A rank needs all methods, so a single update has no value. Call ``update`` and ``compute``, not ``forward``.

    As input to ``update`` the metric accepts the following input:

    - ``method`` (`str`): One of ``methods``
    - ``values`` (mapping of names to numbers or tensors with one element): The metrics of that method

    As output of ``compute`` the metric returns the following output:

    - ``mean_rank`` (`dict`): For each method a scalar `torch.Tensor` between 1 and the number of methods

    Args:
        methods: The names of the methods.
        higher_is_better: For each metric, by name, whether a higher value is better.
        **kwargs: Arguments of every metric, see `torchmetrics.Metric`.

    Raises:
        TypeError: If a direction is not a boolean; in an update, if a value is not a number.
        ValueError: If a method is named twice; in an update, if the method or the names of the metrics are unknown or a
            value is not finite.
        RuntimeError: In ``compute``, if a method was not updated yet.

    Example:
        >>> from lightning_cost.metrics import MeanRank
        >>> metric = MeanRank(["LS", "COST"], higher_is_better={"miou": True, "abs_err": False, "rel_err": False})
        >>> metric.update("LS", {"miou": 0.75, "abs_err": 0.016, "rel_err": 47.0})
        >>> metric.update("LS", {"miou": 0.77, "abs_err": 0.014, "rel_err": 43.0})
        >>> metric.update("COST", {"miou": 0.74, "abs_err": 0.013, "rel_err": 32.0})
        >>> metric.compute()
        {'LS': tensor(1.6667), 'COST': tensor(1.3333)}
    """

    is_differentiable = False
    higher_is_better = False

    def __init__(self, methods: Sequence[str], higher_is_better: Mapping[str, bool], **kwargs: Any) -> None:
        if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
            raise TypeError(f"`methods` must be a sequence of names, at least one, got {methods!r}.")
        for method in methods:
            if not isinstance(method, str):
                raise TypeError(f"`methods` must be a sequence of names, which are strings, got {method!r}.")
        if len(set(methods)) != len(methods):
            raise ValueError(f"`methods` must not name a method twice, got {list(methods)}.")
        super().__init__(len(methods), higher_is_better, **kwargs)
        self.methods = tuple(methods)

    def update(self, method: str, values: Mapping[str, Tensor | float]) -> None:
        """Add one evaluation of one method."""
        if method not in self.methods:
            raise ValueError(f"`method` must be one of {list(self.methods)}, got {method!r}.")
        self._add(self.methods.index(method), values)

    def compute(self) -> dict[str, Tensor]:
        """The mean rank of each method, by its average over all evaluations since the last reset."""
        missing = [method for method, count in zip(self.methods, self.counts.tolist(), strict=True) if not count]
        if missing:
            raise RuntimeError(f"`MeanRank` ranks all methods together: call `update` for {missing} first.")
        ranks = self._as_result(mean_rank(self._averages(), self._directions))
        return dict(zip(self.methods, ranks, strict=True))

    def forward(self, *_: Any, **__: Any) -> Any:
        """Not available: an update takes one method, and a rank needs all of them."""
        raise NotImplementedError(
            "`MeanRank` has no value for a single update: call `update` for every method, then `compute`."
        )


def _as_directions(higher_is_better: Tensor | Sequence[bool], values: Tensor) -> Tensor:
    directions = as_tensor_or_none(higher_is_better)
    if directions is None or directions.dtype != torch.bool:
        raise TypeError(f"`higher_is_better` must hold booleans, got {higher_is_better!r}.")
    if directions.shape != values.shape[-1:]:
        raise ValueError(
            f"`higher_is_better` must have one boolean per metric, shape {tuple(values.shape[-1:])}, "
            f"got {tuple(directions.shape)}."
        )
    return directions.to(values.device)


def _check_finite(argument: str, tensor: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(tensor)).tolist()
    if bad:
        raise ValueError(f"`{argument}` must be finite, got {tensor[tuple(bad[0])].item()} at index {bad[0]}.")


def _positive(argument: str, value: Tensor | float) -> float:
    check_number(argument, value)
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{argument}` must be positive and finite, because Eq. 14 divides by it, got {number}.")
    return number
