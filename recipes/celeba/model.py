"""The LightningModule of CelebA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchjd.aggregation import Aggregator
from torchjd.scalarization import Scalarizer
from torchmetrics.classification import MultilabelF1Score

from lightning_cost import MultiTaskMixin
from lightning_cost.metrics import delta_m
from recipes.celeba.attributes import ATTRIBUTES, SINGLE_TASK_F1, check_attributes
from recipes.celeba.network import FaceNet

__all__ = ["CelebAModel"]


class CelebAModel(MultiTaskMixin, L.LightningModule):
    """Tells which attributes a face has: a network that all share, and a linear head for each.

    The heads are the rows of one linear layer. A row belongs to one attribute alone, its gradient comes from that
    attribute's loss alone, and 40 layers would take longer than one.

    Logged are the F1 of each attribute over the whole split, `val/<attribute>_f1`, counting as found what has a
    probability above 0.5; their mean, `val/mean_f1`; and `val/delta_m`, by how much they fall short of single-task
    values in percent (Eq. 14 of the COST paper); the same with `test/`. Where an attribute is neither there nor found
    anywhere, its F1 is 0.

    Args:
        attributes: Names of `ATTRIBUTES`. One alone gives a single-task baseline.
        width: Channels of the first convolution; the heads see 8 times as many features.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None for the mean of
            the losses.
        lr: Learning rate of Adam.
        single_task_f1: For each attribute the F1 of a model that is trained on it alone; None: the published ones, of
            this network at full width on all images.

    Raises:
        ValueError: If an argument is out of range, names an unknown attribute, or an attribute has no single-task
            value.
    """

    shared_module = "backbone"

    def __init__(
        self,
        attributes: Sequence[str] = ATTRIBUTES,
        width: int = 64,
        mtl_method: Aggregator | Scalarizer | None = None,
        lr: float = 3e-4,
        single_task_f1: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        check_attributes(attributes)
        if not 0 < lr < math.inf:
            raise ValueError(f"lr={lr} must be positive and finite.")
        self.save_hyperparameters(ignore="mtl_method")
        self.mtl_method = mtl_method
        self.attributes, self.lr = tuple(attributes), lr
        self.single_task_f1 = _chosen_baselines(
            SINGLE_TASK_F1 if single_task_f1 is None else single_task_f1, self.attributes
        )
        self.backbone = FaceNet(width)
        self.heads = nn.Linear(self.backbone.num_features, len(self.attributes))
        columns = torch.tensor([ATTRIBUTES.index(name) for name in self.attributes])
        self.register_buffer("columns", columns, persistent=False)
        self.metrics = nn.ModuleDict({stage: _f1(len(self.attributes)) for stage in ("val", "test")})

    def forward(self, image: Tensor) -> Tensor:
        """Logits of all attributes.

        Args:
            image: (B, 3, H, W), RGB in [0, 1].

        Returns:
            (B, number of attributes).
        """
        return self.heads(self.backbone(image))

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Binary cross-entropy of each attribute."""
        logits = self(batch["image"])
        losses = F.binary_cross_entropy_with_logits(logits, self._wanted(batch), reduction="none").mean(dim=0)
        return dict(zip(self.attributes, losses.unbind(), strict=True))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Probabilities, (B, number of attributes)."""
        return torch.sigmoid(self(batch["image"]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count what was found."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count what was found."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the F1."""
        self._log_f1("val")

    def on_test_epoch_end(self) -> None:
        """Log the F1."""
        self._log_f1("test")

    def _wanted(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attributes"][:, self.columns]

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        # Not probabilities: rounded to half precision, some above 0.5 are no longer.
        self.metrics[stage].update((self(batch["image"]) > 0).int(), self._wanted(batch).int())

    def _log_f1(self, stage: str) -> None:
        scores = self.metrics[stage].compute().reshape(-1)
        self.metrics[stage].reset()
        against = list(self.single_task_f1.values())
        each = {f"{stage}/{name}_f1": f1 for name, f1 in zip(self.attributes, scores, strict=True)}
        mean, delta = scores.mean(), delta_m(scores, against, [True] * len(against))
        # The scores are those of all processes already; Lightning warns of each unless it is told to average them.
        self.log_dict(each, sync_dist=True)
        self.log_dict({f"{stage}/mean_f1": mean, f"{stage}/delta_m": delta}, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over network and heads."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _f1(num_attributes: int) -> MultilabelF1Score:
    """The F1 of each attribute."""
    # Its checks of the arguments want two labels at least, and its checks of the values wait for the device.
    return MultilabelF1Score(num_attributes, average=None, validate_args=False)


def _chosen_baselines(scores: Mapping[str, float], attributes: Sequence[str]) -> dict[str, float]:
    """The single-task values of some attributes, in their order."""
    chosen = {}
    for name in attributes:
        if name not in scores:
            raise ValueError(f"`single_task_f1` must have a value for each attribute; there is none for {name!r}.")
        if not 0 < scores[name] <= 1:
            raise ValueError(f"single_task_f1[{name!r}]={scores[name]} must be positive and at most 1.")
        chosen[name] = float(scores[name])
    return chosen
