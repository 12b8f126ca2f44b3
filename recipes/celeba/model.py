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
    """Predicts which attributes a face has: a network that all attributes share, and a linear head for each.

    The heads are the rows of one linear layer, which is faster than 40 layers. Each row belongs to one attribute and
    gets its gradient from the loss of this attribute alone.

    It logs the F1 of each attribute over the whole split, `val/<attribute>_f1`; their mean, `val/mean_f1`; and
    `val/delta_m`, their mean degradation relative to single-task models in percent (Eq. 14 of the COST paper). Tests
    log the same under `test/`. An attribute is predicted where its probability is above 0.5. If it is neither present
    nor predicted in the whole split, its F1 is 0.

    Args:
        attributes: Some of `ATTRIBUTES`. A single attribute gives a baseline.
        width: Channels of the first convolution. The heads get 8 times as many features.
        mtl_method: A TorchJD aggregator of the task gradients or scalarizer of the task losses; None: the mean of the
            losses.
        lr: Learning rate of Adam.
        single_task_f1: Attribute to the F1 of a model that is trained on it alone; None: the published values, which
            belong to this network at full width on all images.

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
        baselines = SINGLE_TASK_F1 if single_task_f1 is None else single_task_f1
        self.single_task_f1 = _chosen_baselines(baselines, self.attributes)
        self.backbone = FaceNet(width)
        self.heads = nn.Linear(self.backbone.num_features, len(self.attributes))
        columns = torch.tensor([ATTRIBUTES.index(name) for name in self.attributes])
        self.register_buffer("columns", columns, persistent=False)
        # `MultilabelF1Score` refuses a single label unless its checks are off. Its checks of values would also wait
        # for the device.
        metric = MultilabelF1Score(len(self.attributes), average=None, validate_args=False)
        self.metrics = nn.ModuleDict({"val": metric, "test": metric.clone()})

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, number of attributes) of images (B, 3, H, W), RGB in [0, 1]."""
        return self.heads(self.backbone(image))

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Binary cross-entropy of each attribute."""
        logits = self(batch["image"])
        losses = F.binary_cross_entropy_with_logits(logits, self._targets(batch), reduction="none").mean(dim=0)
        return dict(zip(self.attributes, losses.unbind(), strict=True))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        """Probabilities, (B, number of attributes)."""
        return torch.sigmoid(self(batch["image"]))

    @property
    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    def _targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attributes"][:, self.columns]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Update the metric."""
        # Half precision would round some probabilities above 0.5 down to 0.5, so look at the logits.
        self.metrics[self._stage].update((self(batch["image"]) > 0).int(), self._targets(batch).int())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the F1."""
        stage = self._stage
        scores = self.metrics[stage].compute().reshape(-1)
        self.metrics[stage].reset()
        against = list(self.single_task_f1.values())
        each = {f"{stage}/{name}_f1": f1 for name, f1 in zip(self.attributes, scores, strict=True)}
        mean, delta = scores.mean(), delta_m(scores, against, [True] * len(against))
        # The scores are the same in all processes already. Lightning warns unless `sync_dist` is set.
        self.log_dict(each, sync_dist=True)
        self.log_dict({f"{stage}/mean_f1": mean, f"{stage}/delta_m": delta}, prog_bar=True, sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _chosen_baselines(scores: Mapping[str, float], attributes: Sequence[str]) -> dict[str, float]:
    """The single-task values of some attributes, in their order."""
    chosen = {}
    for name in attributes:
        if name not in scores:
            raise ValueError(f"`single_task_f1` must have a value for each attribute, but there is none for {name!r}.")
        if not 0 < scores[name] <= 1:
            raise ValueError(f"single_task_f1[{name!r}]={scores[name]} must be positive and at most 1.")
        chosen[name] = float(scores[name])
    return chosen
