"""The mean of the last epochs, which the tables of dense benchmarks report."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from recipes.common.files import replacing

__all__ = ["LastEpochsMean"]

_PREFIX = "val/"


class LastEpochsMean(L.Callback):
    """Averages every metric `val/...` over the last validations of a fit.

    These benchmarks have two splits, so the best epoch could only be chosen on the test data. A mean of the last
    epochs chooses nothing. When the fit ends, the means are logged as `last_10/...` and written to `last_10.json`.
    Checkpoints keep the values, so a resumed fit averages the same epochs as an uninterrupted one.

    Args:
        num_epochs: Number of validations. There is one per epoch unless you tell the Trainer otherwise.

    Raises:
        ValueError: If the number is not positive.
    """

    def __init__(self, num_epochs: int = 10) -> None:
        if num_epochs < 1:
            raise ValueError(f"num_epochs={num_epochs} must be at least 1.")
        self.num_epochs = num_epochs
        self._last: deque[tuple[int, dict[str, float]]] = deque(maxlen=num_epochs)

    @property
    def epochs(self) -> list[int]:
        """The averaged epochs, counted from 0; fewer than `num_epochs` in a short fit."""
        return [epoch for epoch, _ in self._last]

    @property
    def means(self) -> dict[str, float]:
        """Metric to its mean; empty before the first validation."""
        values = [metrics for _, metrics in self._last]
        return {name: sum(metrics[name] for metrics in values) / len(values) for name in (values[-1] if values else {})}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit. Checkpoints are loaded after this."""
        if stage == "fit":
            self._last.clear()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of this validation."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(_PREFIX)}
        self._last.append((trainer.current_epoch, {name.removeprefix(_PREFIX): x for name, x in logged.items()}))

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and write the means."""
        # `log_dir` is broadcast, so all processes must ask for it.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not self._last or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        name = f"last_{self.num_epochs}"
        for logger in trainer.loggers:
            logger.log_metrics({f"{name}/{metric}": mean for metric, mean in self.means.items()}, trainer.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"epochs": self.epochs, "means": self.means}, indent=1)
        with replacing(folder / f"{name}.json") as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")

    @override
    def state_dict(self) -> dict[str, Any]:
        """The metrics of the last validations."""
        return {"last": list(self._last)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics."""
        self._last = deque(state_dict["last"], maxlen=self.num_epochs)
