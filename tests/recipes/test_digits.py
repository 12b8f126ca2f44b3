"""Overlaid digits: the pairs against a reconstruction from scikit-learn's images, and the model on them."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from recipes.digits import DigitsDataModule, DigitsModel
from recipes.digits.data import make_pairs, source_digits

SPLITS = ("train", "val", "test")


def test_splits_partition_the_source_digits():
    rows = [source_digits(split).tolist() for split in SPLITS]
    assert [len(part) for part in rows] == [1000, 350, 447]
    assert sorted(rows[0] + rows[1] + rows[2]) == list(range(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_every_pair_is_two_source_digits_of_its_split(split):
    digits, rows = load_digits(), source_digits(split).numpy()
    sources, classes = digits.images[rows] / 16, digits.target[rows]
    pairs = {name: tensor.numpy() for name, tensor in make_pairs(split, 100, seed=5, ink=True).items()}

    def same(sources, image, region):
        return np.flatnonzero((sources[:, *region] == image[region]).all((1, 2)))

    for image, left, right, ink in zip(pairs["image"][:, 0], pairs["left"], pairs["right"], pairs["ink"], strict=True):
        assert image.shape == (12, 12)
        assert not image[:4, 8:].any()
        assert not image[8:, :4].any()
        # Rows that the other digit does not reach tell which source digits it can be.
        upper = same(sources, image[:8, :8], np.s_[:4, :])
        lower = same(sources, image[4:, 4:], np.s_[4:, :])
        matches = []
        for i in upper:
            for j in lower:
                one, two = np.pad(sources[i], ((0, 4), (0, 4))), np.pad(sources[j], ((4, 0), (4, 0)))
                if np.array_equal(np.where(one > two, one, two), image):
                    matches.append((classes[i], classes[j], (one.sum() - two.sum()) / 5 * 10))
        assert (left, right, pytest.approx(ink, abs=1e-4)) in matches


def test_pairs_are_a_function_of_split_number_and_seed():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (make_pairs("train", 50, seed, ink=True) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in ("image", "left", "right", "ink"))
    assert not torch.equal(first["image"], other["image"])
    assert "ink" not in make_pairs("train", 5)


def test_the_data_module_serves_what_was_asked_for():
    data = DigitsDataModule(batch_size=30, ink=True, num_train=100, num_val=40, num_test=70, seed=4, shuffle_seed=2)
    data.setup("fit")
    sizes = {}
    for split in SPLITS:
        loader = getattr(data, f"{split}_dataloader")()
        batches = list(loader)
        assert len(loader) == len(batches)
        sizes[split] = [len(batch["left"]) for batch in batches]
        pairs = make_pairs(split, {"train": 100, "val": 40, "test": 70}[split], seed=4, ink=True)
        served = torch.cat([batch["image"] for batch in batches])
        if split != "train":
            assert torch.equal(served, pairs["image"])
            assert torch.equal(torch.cat([batch["ink"] for batch in batches]), pairs["ink"])
    assert sizes == {"train": [30, 30, 30], "val": [30, 10], "test": [30, 30, 10]}
    batch = next(iter(data.train_dataloader()))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "image": ((30, 1, 12, 12), torch.float32),
        "left": ((30,), torch.int64),
        "right": ((30,), torch.int64),
        "ink": ((30,), torch.float32),
    }


def test_defaults_of_the_data_module():
    data = DigitsDataModule()
    data.setup("fit")
    assert [len(x) for x in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == [62, 16, 32]
    assert set(next(iter(data.train_dataloader()))) == {"image", "left", "right"}


@pytest.mark.parametrize("tasks", [("left",), ("right",), ("ink",), ("left", "right"), ("right", "ink", "left")])
def test_losses_are_weighted_and_named_by_task(tasks):
    torch.manual_seed(0)
    model = DigitsModel(tasks, width=7, loss_weights={tasks[0]: 0.25})
    batch = make_pairs("val", 9, ink=True)
    predictions, losses = model(batch["image"]), model.task_losses(batch, 0)
    assert tuple(losses) == tuple(predictions) == tasks
    assert model.backbone(batch["image"]).shape == (9, 7)
    for task, loss in losses.items():
        if task == "ink":
            expected = ((predictions[task] - batch[task]) ** 2).mean()
        else:
            expected = -F.log_softmax(predictions[task], dim=1)[range(9), batch[task]].mean()
        torch.testing.assert_close(loss, expected * (0.25 if task == tasks[0] else 1.0))


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DigitsModel, {"tasks": ()}, r"tasks=\(\) must name"),
        (DigitsModel, {"tasks": ("left", "up")}, "must name one or more of"),
        (DigitsModel, {"tasks": ("left", "left")}, "each once"),
        (DigitsModel, {"width": 0}, "width=0 must be"),
        (DigitsModel, {"loss_weights": {"ink": 1.0}}, "names 'ink', which is not among"),
        (DigitsModel, {"loss_weights": {"left": 0.0}}, r"loss_weights\['left'\]=0.0 must be positive"),
        (DigitsDataModule, {"num_val": 0}, "num_val=0 must be at least 1"),
        (DigitsDataModule, {"seed": -1}, "seed=-1 must be at least 0"),
        (DigitsDataModule, {"num_train": 63}, "num_train=63 must be at least batch_size=64"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("tasks", [("left",), ("left", "right", "ink")])
def test_it_learns(tmp_path, tasks):
    torch.manual_seed(0)
    weights = {"ink": 0.03} if "ink" in tasks else None
    model, data = DigitsModel(tasks, loss_weights=weights, lr=3e-3), DigitsDataModule(ink="ink" in tasks)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    metrics = {**trainer.callback_metrics, **trainer.test(model, data, verbose=False)[0]}
    for stage in ("val", "test"):
        assert {name for name in metrics if name.startswith(stage)} == {
            f"{stage}/{task}_{'mse' if task == 'ink' else 'accuracy'}" for task in tasks
        }
        assert metrics[f"{stage}/left_accuracy"] > 0.8
        if "ink" in tasks:
            assert metrics[f"{stage}/ink_mse"] < 0.5 * make_pairs("test", 2000, ink=True)["ink"].var()
