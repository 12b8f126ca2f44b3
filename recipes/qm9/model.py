"""The LightningModule of QM9."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer
from torchmetrics import MeanAbsoluteError

from lightning_cost import MultiTaskMixin
from lightning_cost.metrics import delta_m
from recipes.common.precision import refuse_half_precision
from recipes.qm9.network import MoleculeNet
from recipes.qm9.targets import BENCHMARK, chosen_targets

__all__ = ["QM9Model", "Schedule"]

Schedule = Literal["plateau", "cosine"]


class QM9Model(MultiTaskMixin, L.LightningModule):
    """Predicts properties of molecules: a network that all share, and a linear head for each.

    Targets are standardized by the statistics of the training split, which the model takes from the data module before
    it trains and keeps in its checkpoints. The loss of a task is the squared error of its standardized target.

    Logged are the mean absolute errors, `val/<target>_mae`, in the units that papers report (energies in meV), and
    `val/delta_m`, their mean excess over single-task values in percent (Eq. 14 of the COST paper); the same with
    `test/`.

    Args:
        targets: Names of `TARGETS`. One alone gives a single-task baseline.
        width: Features of an atom, and of a molecule.
        edge_hidden: Hidden features of the network that makes the matrix of an edge.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None for the mean of
            the losses.
        lr: Learning rate of Adam.
        schedule: "plateau" multiplies the learning rate by 0.7 when `val/delta_m` has not improved for 5 validations,
            down to 1e-5, as the benchmark does; "cosine" takes it to zero within the epochs of the Trainer, for runs
            that are too short for plateaus.
        single_task_maes: For each target the error of a model that is trained on it alone, in the units reported;
            None: the published ones, of this network at full size on all molecules.

    Raises:
        ValueError: If an argument is out of range, names an unknown target, or a target has no single-task value.
    """

    shared_module = "backbone"

    def __init__(
        self,
        targets: Sequence[str] = BENCHMARK,
        width: int = 64,
        edge_hidden: int = 128,
        mtl_method: Aggregator | Scalarizer | None = None,
        lr: float = 1e-3,
        schedule: Schedule = "plateau",
        single_task_maes: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        chosen, targets = chosen_targets(targets), list(targets)
        if not 0 < lr < math.inf:
            raise ValueError(f"lr={lr} must be positive and finite.")
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule={schedule!r} must be one of {get_args(Schedule)}.")
        self.save_hyperparameters(ignore="mtl_method")
        self.mtl_method = mtl_method
        self.targets, self.lr, self.schedule = tuple(targets), lr, schedule
        self.backbone = MoleculeNet(width, edge_hidden)
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in chosen})
        published = {name: target.single_task_mae for name, target in chosen.items()}
        self._baselines = _checked_baselines(published if single_task_maes is None else single_task_maes, self.targets)
        # What a checkpoint or the data give; until then everything computed with it is NaN.
        self.register_buffer("target_mean", torch.full((len(chosen),), math.nan))
        self.register_buffer("target_std", torch.full((len(chosen),), math.nan))
        factors = torch.tensor([target.report_factor for target in chosen.values()])
        self.register_buffer("report_factors", factors, persistent=False)
        self.metrics = nn.ModuleDict({stage: MeanAbsoluteError(num_outputs=len(chosen)) for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Take the statistics of the targets from the data module, unless the model has some.

        Raises:
            MisconfigurationException: If the Trainer casts the model to half precision.
            ValueError: If the data module has other targets, or if there is none and there are no statistics.
        """
        super().setup(stage)
        refuse_half_precision(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and tuple(data.targets) != self.targets:
            raise ValueError(f"The model predicts {self.targets}, but the data module has targets={data.targets}.")
        if not torch.isnan(self.target_mean).all():
            return
        if data is None:
            raise ValueError(
                "The model has no mean and standard deviation of its targets yet. Give the Trainer a `QM9DataModule`,"
                " or load a checkpoint."
            )
        self.target_mean.copy_(data.target_mean)
        self.target_std.copy_(data.target_std)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict standardized targets.

        Args:
            batch: `elements` (B, N), `bonds` (B, N, N), `positions` (B, N, 3) and `mask` (B, N).

        Returns:
            Target to (B,).
        """
        features = self.backbone(batch["elements"], batch["bonds"], batch["positions"], batch["mask"])
        # A prediction in half precision would be off by about the error of a good network.
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.target_mean.dtype)
            return {name: head(features).squeeze(1) for name, head in self.heads.items()}

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Squared error of each standardized target."""
        standardized = (batch["targets"] - self.target_mean) / self.target_std
        return {
            name: F.mse_loss(prediction, target)
            for (name, prediction), target in zip(self(batch).items(), standardized.unbind(1), strict=True)
        }

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Predictions in torch_geometric's units, (B, number of targets)."""
        return torch.stack(list(self(batch).values()), dim=1) * self.target_std + self.target_mean

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Collect the errors."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Collect the errors; returns `predictions` and `targets`, (B, number of targets), in the units reported."""
        return self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the errors."""
        self._log_errors("val")

    def on_test_epoch_end(self) -> None:
        """Log the errors."""
        self._log_errors("test")

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        predictions = self.predict_step(batch) * self.report_factors
        targets = batch["targets"] * self.report_factors
        self.metrics[stage].update(predictions, targets)
        return {"predictions": predictions, "targets": targets}

    def _log_errors(self, stage: str) -> None:
        errors = self.metrics[stage].compute().reshape(-1)
        self.metrics[stage].reset()
        for name, error in zip(self.targets, errors, strict=True):
            if not torch.isfinite(error):
                raise ValueError(f"{stage}/{name}_mae is {float(error)}: the training has diverged. Lower `lr`.")
            # The metric has already seen all processes: `sync_dist` only tells Lightning so.
            self.log(f"{stage}/{name}_mae", error, sync_dist=True)
        excess = delta_m(errors, self._baselines, [False] * len(errors))
        self.log(f"{stage}/delta_m", excess, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over network and heads, with the schedule that was asked for."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if self.schedule == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler: dict[str, Any] = {"scheduler": CosineAnnealingLR(optimizer, steps), "interval": "step"}
        else:
            plateau = ReduceLROnPlateau(optimizer, factor=0.7, patience=5, min_lr=1e-5)
            frequency = self.trainer.check_val_every_n_epoch or 1
            scheduler = {"scheduler": plateau, "monitor": "val/delta_m", "frequency": frequency}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # type: ignore[return-value]


def _checked_baselines(maes: Mapping[str, float | None], targets: Sequence[str]) -> list[float]:
    """The single-task values of some targets, in their order."""
    values = []
    for name in targets:
        value = maes.get(name)
        if value is None:
            raise ValueError(
                f"`single_task_maes` must have a value for each target; there is none for {name!r}. Give those of"
                " single-task runs of your own."
            )
        if not 0 < value < math.inf:
            raise ValueError(f"single_task_maes[{name!r}]={value} must be positive and finite.")
        values.append(float(value))
    return values
