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
    """Predicts properties of molecules: a network that all targets share, and a linear head for each.

    Targets are standardized by the statistics of the training split. The model takes these from the data module before
    it trains, and keeps them in its checkpoints. The loss of a task is the squared error of its standardized target.

    It logs the mean absolute errors `val/<target>_mae` in the units of the papers (energies in meV), and `val/delta_m`,
    their mean degradation relative to single-task models in percent (Eq. 14 of the COST paper). Tests log the same
    under `test/`.

    Args:
        targets: Names of `TARGETS`. A single target gives a baseline.
        width: Features of an atom and of a molecule.
        edge_hidden: Hidden features of the edge network.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None: the mean of the
            losses.
        lr: Learning rate of Adam.
        schedule: "plateau": multiply the learning rate by 0.7 when `val/delta_m` has not improved for 5 validations,
            down to 1e-5, as the benchmark does. "cosine": lower it to zero within the epochs of the Trainer, for runs
            that are too short for plateaus.
        single_task_maes: Target to the error of a model that is trained on it alone, in the reported units; None: the
            published values, which belong to this network at full size on all molecules.

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
        # A checkpoint or the data module gives the statistics. Until then, all that is computed with them is NaN.
        self.register_buffer("target_mean", torch.full((len(chosen),), math.nan))
        self.register_buffer("target_std", torch.full((len(chosen),), math.nan))
        factors = torch.tensor([target.report_factor for target in chosen.values()])
        self.register_buffer("report_factors", factors, persistent=False)
        self.metrics = nn.ModuleDict({stage: MeanAbsoluteError(num_outputs=len(chosen)) for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Take the statistics of the targets from the data module, unless the model has some.

        Raises:
            MisconfigurationException: If the Trainer casts the model to half precision.
            ValueError: If the data module has other targets, or neither it nor the model has statistics.
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
        """Predict each standardized target, (B,); see `MoleculeTensors.batch` for the batch."""
        features = self.backbone(batch["elements"], batch["bonds"], batch["positions"], batch["mask"])
        # Half precision would change a prediction by about the error of a good network.
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

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Update the errors; returns `predictions` and `targets`, (B, number of targets), in the reported units."""
        predictions = self.predict_step(batch) * self.report_factors
        targets = batch["targets"] * self.report_factors
        self.metrics[self._stage].update(predictions, targets)
        return {"predictions": predictions, "targets": targets}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the errors."""
        stage = self._stage
        errors = self.metrics[stage].compute().reshape(-1)
        self.metrics[stage].reset()
        for name, error in zip(self.targets, errors, strict=True):
            if not torch.isfinite(error):
                raise ValueError(f"{stage}/{name}_mae is {float(error)}: the training has diverged. Lower `lr`.")
            # The errors are the same in all processes already. Lightning warns unless `sync_dist` is set.
            self.log(f"{stage}/{name}_mae", error, sync_dist=True)
        excess = delta_m(errors, self._baselines, [False] * len(errors))
        self.log(f"{stage}/delta_m", excess, prog_bar=True, sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with the schedule."""
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
                f"`single_task_maes` must have a value for each target, but there is none for {name!r}. Give the values"
                " of your own single-task runs."
            )
        if not 0 < value < math.inf:
            raise ValueError(f"single_task_maes[{name!r}]={value} must be positive and finite.")
        values.append(float(value))
    return values
