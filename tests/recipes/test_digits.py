"""Overlaid digits: the pairs against a reconstruction from scikit-learn's images, and the model on them."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits

from recipes.digits import DigitsDataModule, DigitsModel
from recipes.digits.data import make_pairs, source_digits
from recipes.digits.tasks import TASKS
from tests.support.nets import make_trainer

THREE = ("left", "right", "ink")
SPLITS = ("train", "val", "test")


def test_splits_partition_the_source_digits():
    rows = [source_digits(split).tolist() for split in SPLITS]
    assert [len(part) for part in rows] == [1000, 350, 447]
    assert sorted(rows[0] + rows[1] + rows[2]) == list(range(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_every_pair_is_two_source_digits_of_its_split(split):
    digits, rows = load_digits(), source_digits(split).numpy()
    sources, classes = digits.images[rows] / 16, digits.target[rows]
    pairs = {name: tensor.numpy() for name, tensor in make_pairs(split, 100, seed=5, tasks=THREE).items()}

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
    first, again, other = (make_pairs("train", 50, seed, THREE) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in ("image", *THREE))
    assert not torch.equal(first["image"], other["image"])


def test_the_pairs_of_a_seed_are_the_ones_that_they_always_were():
    pairs = make_pairs("train", 6, seed=0, tasks=THREE)
    assert pairs["left"].tolist() == [2, 7, 7, 1, 9, 7]
    assert pairs["right"].tolist() == [6, 4, 0, 0, 6, 8]
    assert pairs["ink"].tolist() == [-1.75, -6.5, -4.875, 7.125, 3.125, -2.0]


def test_targets_by_hand():
    pairs = make_pairs("train", 6, seed=0, tasks=tuple(TASKS))
    # Of the pairs 2 6, 7 4, 7 0, 1 0, 9 6 and 7 8.
    assert pairs["sum"].tolist() == [8, 11, 7, 1, 15, 15]
    assert pairs["larger"].tolist() == [0, 1, 1, 1, 1, 0]
    assert pairs["left_odd"].tolist() == [0, 1, 1, 1, 1, 1]
    assert pairs["right_odd"].tolist() == [0, 0, 0, 0, 0, 0]


def test_a_digit_is_not_larger_than_its_equal():
    pairs = make_pairs("train", 500, tasks=("left", "right", "larger"))
    equal = pairs["left"] == pairs["right"]
    assert equal.any()
    assert not pairs["larger"][equal].any()


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.num_classes is not None])
def test_every_class_is_there_and_none_beyond(name):
    targets = make_pairs("train", 4000, tasks=(name,))[name]
    assert targets.dtype == torch.int64
    assert targets.unique().tolist() == list(range(TASKS[name].num_classes))


def test_tasks_change_neither_the_images_nor_the_targets_of_others():
    every = make_pairs("test", 50, seed=3, tasks=tuple(TASKS))
    assert set(every) == {"image", *TASKS}
    for name in TASKS:
        alone = make_pairs("test", 50, seed=3, tasks=(name,))
        assert set(alone) == {"image", name}
        assert torch.equal(alone["image"], every["image"])
        assert torch.equal(alone[name], every[name])


def test_the_data_module_serves_what_was_asked_for():
    data = DigitsDataModule(batch_size=30, tasks=THREE, num_train=100, num_val=40, num_test=70, seed=4, shuffle_seed=2)
    data.setup("fit")
    sizes = {}
    for split in SPLITS:
        loader = getattr(data, f"{split}_dataloader")()
        batches = list(loader)
        assert len(loader) == len(batches)
        sizes[split] = [len(batch["left"]) for batch in batches]
        pairs = make_pairs(split, {"train": 100, "val": 40, "test": 70}[split], seed=4, tasks=THREE)
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


@pytest.mark.parametrize(
    "tasks", [*((name,) for name in TASKS), ("left", "right"), ("right", "ink", "left"), tuple(TASKS)]
)
def test_losses_are_weighted_and_named_by_task(tasks):
    torch.manual_seed(0)
    model = DigitsModel(tasks, width=7, loss_weights={tasks[0]: 0.25})
    batch = make_pairs("val", 9, tasks=tasks)
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
        (DigitsModel, {"lr_milestones": (2, 2)}, r"lr_milestones=\(2, 2\) must be epochs"),
        (DigitsModel, {"lr_milestones": (0,)}, "from 1 on, in increasing order"),
        (DigitsModel, {"lr_factor": 0.0}, "lr_factor=0.0 must be positive"),
        (DigitsModel, {"loss_weights": {"left": 0.0}}, r"loss_weights\['left'\]=0.0 must be positive"),
        (DigitsDataModule, {"tasks": ("left", "up")}, "must name one or more of"),
        (DigitsDataModule, {"num_val": 0}, "num_val=0 must be at least 1"),
        (DigitsDataModule, {"seed": -1}, "seed=-1 must be at least 0"),
        (DigitsDataModule, {"num_train": 63}, "num_train=63 must be at least batch_size=64"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def quiet_trainer(folder, **arguments):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


# Well above the share of the most frequent class, which is .14 for a digit, .11 for `sum` and .55 for `larger`.
LEARNED = {"left": 0.8, "right": 0.8, "sum": 0.15, "larger": 0.65, "left_odd": 0.85, "right_odd": 0.85}


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [("left",), THREE, tuple(TASKS)])
def test_it_learns(tmp_path, tasks):
    torch.manual_seed(0)
    weights = {"ink": 0.03} if "ink" in tasks else None
    model, data = DigitsModel(tasks, loss_weights=weights, lr=3e-3), DigitsDataModule(tasks=tasks)
    trainer = quiet_trainer(tmp_path, max_epochs=4)
    trainer.fit(model, data)
    metrics = {**trainer.callback_metrics, **trainer.test(model, data, verbose=False)[0]}
    for stage in ("val", "test"):
        assert {name for name in metrics if name.startswith(stage)} == {
            f"{stage}/{task}_{'mse' if task == 'ink' else 'accuracy'}" for task in tasks
        }
        accuracies = {task: metrics[f"{stage}/{task}_accuracy"] for task in tasks if task != "ink"}
        assert {task for task, accuracy in accuracies.items() if accuracy < LEARNED[task]} == set()
        if "ink" in tasks:
            assert metrics[f"{stage}/ink_mse"] < 0.5 * make_pairs("test", 2000, tasks=("ink",))["ink"].var()


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        ({}, [1e-3, 1e-3, 1e-3, 1e-3]),
        ({"lr_milestones": [1, 3]}, [1e-3, 1e-4, 1e-4, 1e-5]),
        ({"lr_milestones": (2,), "lr_factor": 0.5}, [1e-3, 1e-3, 5e-4, 5e-4]),
    ],
)
def test_the_learning_rate_drops_before_the_milestones(tmp_path, arguments, rates):
    class Watched(DigitsModel):
        def on_train_epoch_start(self):
            seen.append(self.optimizers().param_groups[0]["lr"])

    seen = []
    data = DigitsDataModule(num_train=64, num_val=64, num_test=64)
    quiet_trainer(tmp_path, max_epochs=4).fit(Watched(width=4, **arguments), data)
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize("of_data", [["left", "right"], ("left", "right", "ink")], ids=repr)
def test_a_logger_takes_the_tasks_of_both_modules_however_they_are_spelled(tmp_path, of_data):
    data = DigitsDataModule(tasks=of_data, num_train=64, num_val=64, num_test=64)
    logger = CSVLogger(tmp_path)
    make_trainer(max_epochs=1, logger=logger).fit(DigitsModel(("left", "right")), data)
    assert logger.experiment.hparams["tasks"] == ("left", "right")
