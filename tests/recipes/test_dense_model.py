"""The modules of dense benchmarks: losses, metrics of the whole split, and the means of the last epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.testing import assert_close
from torchjd.aggregation import UPGrad

from lightning_cost import SymmetryTeleportCallback
from lightning_cost._training.shared import shared_parameters
from lightning_cost.metrics import delta_m
from recipes.cityscapes import CityScapesModel
from recipes.dense.last_epochs import LastEpochsMean
from recipes.dense.losses import depth_loss, normals_loss, segmentation_loss
from recipes.dense.model import DenseModel
from recipes.dense.pictures import ConfusionMatrixPlot, DensePictures
from recipes.nyuv2 import NYUV2, NYUv2DataModule, NYUv2Model
from tests.support.dense_files import write_random
from tests.support.dense_models import TINY, Metrics, lively, logged, tiny
from tests.support.nets import make_trainer

pytestmark = pytest.mark.slow

NAMES = {
    "segmentation": ("miou", "pixel_accuracy"),
    "depth": ("absolute_error", "relative_error"),
    "normals": ("mean_angle", "median_angle", "within_11", "within_22", "within_30"),
}
HIGHER = {"miou", "pixel_accuracy", "within_11", "within_22", "within_30"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("nyuv2"), NYUV2, num_train=4, num_val=3, height=32, width=32)


# ------------------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize(
    ("model", "network", "millions", "shared", "shared_with_attention"),
    [
        (NYUv2Model, "segnet", 25.06, 24.94, None),
        (NYUv2Model, "mtan", 44.23, 35.16, 44.12),
        (CityScapesModel, "segnet", 25.02, 24.94, None),
        (CityScapesModel, "mtan", 41.21, 35.16, 41.13),
    ],
)
def test_sizes_and_what_is_shared(
    model: type[DenseModel], network: Any, millions: float, shared: float, shared_with_attention: float | None
):
    with torch.device("meta"):
        modules = [
            model(network=network),
            *([model(network=network, share_attention=True)] if shared_with_attention else []),
        ]
    for module, expected in zip(modules, (shared, shared_with_attention), strict=False):
        assert round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 2) == millions
        assert round(sum(parameter.numel() for parameter in shared_parameters(module)) / 1e6, 2) == expected


@pytest.mark.parametrize(
    ("model", "tasks"), [(NYUv2Model, None), (NYUv2Model, ["normals", "depth"]), (CityScapesModel, ["depth"])]
)
def test_losses_are_those_of_the_tasks(model: type[DenseModel], tasks: list[str] | None, root: Path):
    data = NYUv2DataModule(root, batch_size=3)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module = tiny(model, tasks=tasks)
    losses = module.task_losses(batch, 0)
    assert tuple(losses) == tuple(tasks or NAMES)
    functions = {"segmentation": segmentation_loss, "depth": depth_loss, "normals": normals_loss}
    for task, prediction in module(batch["image"]).items():
        assert_close(losses[task], functions[task](prediction, batch[task]))


def metrics_by_hand(model: DenseModel, data: L.LightningDataModule, average: str) -> Metrics:
    """By numpy, from the predictions for the validation split."""
    depths, angles, hits = [], [], np.zeros((13, 13))
    with torch.no_grad():
        for batch in data.val_dataloader():
            predicted = {task: x.double().numpy() for task, x in model.eval()(batch["image"]).items()}
            labels, depth, normals = (batch[task].numpy() for task in NAMES)
            np.add.at(hits, (labels[labels >= 0], predicted["segmentation"].argmax(1)[labels >= 0]), 1)
            error = np.abs(predicted["depth"] - depth)[depth > 0]
            depths.append(np.stack([error, error / depth[depth > 0]]))
            cosine = (predicted["normals"] * normals).sum(1)[np.abs(normals).sum(1) > 0]
            angles.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    if average == "pixels":
        depths, angles = [np.concatenate(depths, axis=1)], [np.concatenate(angles)]
    union = hits.sum(0) + hits.sum(1) - np.diag(hits)
    within = {
        f"within_{int(limit)}": np.mean([(some < limit).mean() for some in angles]) for limit in (11.25, 22.5, 30)
    }
    return {
        "miou": (np.diag(hits) / union)[union > 0].mean(),
        "pixel_accuracy": np.diag(hits).sum() / hits.sum(),
        "absolute_error": np.mean([some[0].mean() for some in depths]),
        "relative_error": np.mean([some[1].mean() for some in depths]),
        "mean_angle": np.mean([some.mean() for some in angles]),
        "median_angle": np.mean([np.median(some) for some in angles]),
    } | within


@pytest.mark.parametrize("average", ["batch", "pixels"])
def test_metrics_are_those_of_the_whole_split(average: Any, root: Path):
    model, data = lively(average=average), NYUv2DataModule(root, batch_size=2)
    trainer = make_trainer()
    trainer.validate(model, data, verbose=False)
    validated = logged(trainer)
    expected = metrics_by_hand(model, data, average)
    other = metrics_by_hand(model, data, "pixels" if average == "batch" else "batch")
    assert {name for name in expected if expected[name] == other[name]} == set(NAMES["segmentation"])
    assert list(expected) == [name for names in NAMES.values() for name in names]
    for name, value in expected.items():
        assert validated[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    names = list(expected)
    published = [NYUv2Model.published_values[name] for name in names]
    change = delta_m(torch.tensor([validated[name] for name in names]), published, [name in HIGHER for name in names])
    assert validated["delta_m"] == pytest.approx(float(change), rel=1e-5)
    assert set(validated) == {*names, "delta_m"}
    trainer.test(model, data, verbose=False)
    assert logged(trainer, "test") == validated


def test_a_single_task_baseline_trains_and_is_compared_with_values_of_ones_own(root: Path):
    model = tiny(tasks=["depth"], single_task_values={"absolute_error": 2.0, "relative_error": 1.0})
    trainer = make_trainer()
    trainer.fit(model, NYUv2DataModule(root, tasks=["depth"]))
    values = logged(trainer)
    assert set(values) == {"absolute_error", "relative_error", "delta_m"}
    degradation = 50 * ((values["absolute_error"] - 2) / 2 + (values["relative_error"] - 1))
    assert values["delta_m"] == pytest.approx(degradation, rel=1e-5)


def test_half_precision_is_for_the_network_and_not_for_the_truth(root: Path, tmp_path: Path):
    callbacks = [DensePictures(1, 1), ConfusionMatrixPlot(1), SymmetryTeleportCallback()]
    model = tiny(mtl_method=UPGrad())
    seen = []
    model.network.heads["depth"].register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    trainer = make_trainer(max_epochs=2, precision="bf16-mixed", callbacks=callbacks, default_root_dir=tmp_path)
    trainer.fit(model, NYUv2DataModule(root))
    assert set(seen) == {torch.bfloat16}
    assert all(np.isfinite(list(logged(trainer).values())))
    assert {path.parts[-2] for path in tmp_path.rglob("*.png")} == {"pictures", "confusion"}
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(MisconfigurationException, match=f"precision='{precision}' rounds the targets"):
            make_trainer(max_epochs=1, precision=precision).fit(tiny(), NYUv2DataModule(root))


def test_a_training_that_diverged_says_so(root: Path):
    model = tiny(network="segnet", tasks=["depth"])
    with torch.no_grad():
        model.network.heads["depth"][-1].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="val/absolute_error is nan in epoch 0: the training has diverged"):
        make_trainer().validate(model, NYUv2DataModule(root), verbose=False)


@pytest.mark.parametrize(
    ("model", "values", "published"),
    [
        # Nash-MTL and FairGrad in Tables 1 and 2 of the COST paper, rounded as printed there.
        (NYUv2Model, (0.4013, 0.6593, 0.53, 0.22, 25.26, 20.08, 0.2840, 0.5547, 0.6815), -4.04),
        (NYUv2Model, (0.3974, 0.6601, 0.54, 0.22, 24.84, 19.60, 0.2926, 0.5658, 0.6916), -4.66),
        (CityScapesModel, (0.7541, 0.9366, 0.0129, 35.02), 6.82),
        (CityScapesModel, (0.7572, 0.9368, 0.0134, 32.25), 5.18),
    ],
)
def test_published_rows_have_their_published_degradation(
    model: type[DenseModel], values: tuple[float, ...], published: float
):
    with torch.device("meta"):
        metrics = [metric for some in model().metrics["val"].values() for metric in some.values()]
    better = [bool(metric.higher_is_better) for metric in metrics]
    degradation = delta_m(torch.tensor(values), list(model.published_values.values()), better)
    assert float(degradation) == pytest.approx(published, abs=0.3)


def test_data_without_a_target_are_refused_before_training(root: Path):
    message = r"The data module has tasks=\('depth',\), but the model is trained on \['normals'\] as well"
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(tiny(tasks=["depth", "normals"]), NYUv2DataModule(root, tasks=["depth"]))


def test_the_learning_rate_drops_before_its_milestones(root: Path):
    class Watched(NYUv2Model):
        def on_train_epoch_start(self) -> None:
            rates.append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    rates: list[float] = []
    model = tiny(Watched, tasks=["depth"], lr_milestones=[2], lr_factor=0.5)
    trainer = make_trainer(max_epochs=4, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(model, NYUv2DataModule(root, tasks=["depth"]))
    assert rates == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5])
    assert (tiny().lr_milestones, tiny().lr_factor) == ((100,), 0.5)


def test_it_learns(root: Path):
    model, data = tiny(lr=0.01, network="segnet"), NYUv2DataModule(root, batch_size=4, augment=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    before = model.task_losses(batch, 0)
    make_trainer(max_epochs=30, limit_val_batches=0).fit(model, data)
    after = model.task_losses(batch, 0)
    assert all(after[task] < before[task] for task in before), (before, after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["colour"]}, r"tasks=\['colour'\] must name one or more of"),
        ({"network": "unet"}, "network='unet' must be one of"),
        ({"network": "segnet", "share_attention": True}, "network='segnet' has no attention"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr_factor": -1.0}, r"lr_factor=-1.0 must be positive"),
        ({"lr_milestones": [3, 3]}, r"lr_milestones=\[3, 3\] must be epochs"),
        ({"average": "median"}, "`average` must be one of"),
        ({"single_task_values": {"miou": 0.4}}, r"\['pixel_accuracy', .*\] have none"),
        ({"tasks": ["depth"], "single_task_values": {"absolute_error": 0, "relative_error": 1}}, "=0 must be positive"),
        ({"widths": (1, 2)}, "must be 5 positive numbers"),
    ],
)
def test_bad_arguments(arguments: Mapping[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NYUv2Model(**{"widths": TINY, **arguments})


# ------------------------------------------------------------------------------------------- resume and last epochs


class History(L.Callback):
    """Metrics of all validations."""

    def __init__(self) -> None:
        self.validations: list[Metrics] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations.append(logged(trainer))


def test_a_resumed_run_ends_as_an_uninterrupted_one_and_averages_its_last_epochs(root: Path, tmp_path: Path):
    tasks = ["segmentation", "depth"]

    def fit(folder: Path, checkpoint: Path | None = None) -> tuple[DenseModel, LastEpochsMean, list[Metrics]]:
        model, last, history = tiny(tasks=tasks, mtl_method=UPGrad(), lr=1e-3), LastEpochsMean(2), History()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(
            max_epochs=3,
            callbacks=[history, last, *([] if checkpoint else [saving])],
            enable_checkpointing=checkpoint is None,
            logger=CSVLogger(folder),
        )
        trainer.fit(model, NYUv2DataModule(root, tasks=tasks), ckpt_path=checkpoint)
        return model, last, history.validations

    whole, last, validations = fit(tmp_path / "whole")
    # In the middle of the second of three epochs: one validation is in the checkpoint.
    resumed, resumed_last, rest = fit(tmp_path / "resumed", tmp_path / "step=3.ckpt")
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert rest == validations[1:]
    assert len(validations) == 3
    assert resumed_last.epochs == last.epochs == [1, 2]
    expected = {name: np.mean([some[name] for some in validations[1:]]) for name in validations[0]}
    for folder, callback in (("whole", last), ("resumed", resumed_last)):
        assert callback.means == pytest.approx(expected)
        (written,) = (tmp_path / folder).rglob("last_2.json")
        assert json.loads(written.read_text()) == {"epochs": [1, 2], "means": callback.means}
        table = written.with_name("metrics.csv").read_text()
        assert "last_2/delta_m" in table
        assert str(callback.means["delta_m"]) in table


def test_the_mean_begins_anew_with_every_fit(root: Path, tmp_path: Path):
    last = LastEpochsMean()
    for epochs in (2, 1):
        trainer = make_trainer(max_epochs=epochs, callbacks=[last], default_root_dir=tmp_path, limit_train_batches=1)
        trainer.fit(tiny(tasks=["depth"]), NYUv2DataModule(root, tasks=["depth"]))
        trainer.validate(tiny(tasks=["depth"]), NYUv2DataModule(root, tasks=["depth"]), verbose=False)
        assert last.epochs == list(range(epochs))
    with pytest.raises(ValueError, match="num_epochs=0 must be at least 1"):
        LastEpochsMean(0)
