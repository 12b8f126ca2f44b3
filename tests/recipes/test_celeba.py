"""CelebA from the network to the command line, on drawn faces."""

from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torchjd.aggregation import FairGrad, UPGrad

from lightning_cost.searches import LevelSetSearch
from recipes.celeba import CelebADataModule, CelebAModel
from recipes.celeba.attributes import ATTRIBUTES, SINGLE_TASK_F1
from recipes.celeba.bars import AttributeBars, bar_figure
from recipes.celeba.network import FaceNet
from recipes.scenes.writers import write_celeba

pytestmark = pytest.mark.slow

SIZES = {"train": 12, "val": 7, "test": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_celeba(tmp_path_factory.mktemp("faces"), *SIZES.values(), seed=0), tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_data(folders):
    root, cache_dir = folders
    return partial(CelebADataModule, root, num_workers=1, cache_dir=cache_dir)


@pytest.fixture
def data(make_data):
    return make_data(batch_size=4, image_size=8)


@pytest.fixture
def make_trainer(tmp_path):
    def make_trainer(*callbacks, **arguments):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path}
        return L.Trainer(**{**quiet, **arguments}, callbacks=list(callbacks))

    return make_trainer


def make_model(seed=0, **arguments):
    torch.manual_seed(seed)
    return CelebAModel(**{"width": 2, **arguments})


def make_batch(num=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(num, 3, 8, 8, generator=generator)
    return {"image": image, "attributes": torch.randint(2, (num, 40), generator=generator).float()}


def test_the_network_is_the_published_one():
    with torch.device("meta"):
        model = CelebAModel()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == 5.20
    layers = list(model.backbone.modules())
    convolutions = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    assert convolutions == [64, 128, 128, 256, 256, 512, 512]
    assert [layer.out_features for layer in layers if isinstance(layer, nn.Linear)] == [512, 512]
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 40)


def test_the_network_computes_what_it_says():
    torch.manual_seed(0)
    net, image = FaceNet(2), torch.rand(5, 3, 16, 16)
    weights = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    features = image
    for index, weight in enumerate(weights[:7]):
        if index in (1, 3, 5):
            features = F.max_pool2d(features, 2)
        features = F.conv2d(features, weight, padding=1)
        features = F.batch_norm(features, None, None, training=True).relu()
    features = features.mean(dim=(2, 3))
    for weight in weights[7:]:
        features = F.batch_norm(features @ weight.T, None, None, training=True).relu()
    torch.testing.assert_close(net(image), features)
    assert net.num_features == features.shape[1] == 16


def test_adapters_reach_every_matrix():
    net = FaceNet(1)
    matrices = {id(parameter) for parameter in net.parameters() if parameter.ndim > 1}
    found = LevelSetSearch().reach({"backbone": net}, list(net.parameters()))
    assert {id(parameter) for parameter in found} == matrices


class Gradients(Callback):
    """Keeps the gradients of the first step: of the tasks, and of the heads."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rows = dict(zip(pl_module.task_gradients.names, pl_module.task_gradients.matrix.clone(), strict=True))
        self.heads = {name: parameter.grad.clone() for name, parameter in pl_module.heads.named_parameters()}


@pytest.mark.parametrize("attributes", [ATTRIBUTES, ("Young", "Bald", "Smiling")])
def test_every_attribute_has_its_own_loss_head_and_task_gradient(make_trainer, attributes):
    model, batch = make_model(attributes=attributes, mtl_method=UPGrad()), make_batch()
    # A layer of its own for each attribute, as in the published code.
    reference = make_model(attributes=attributes)
    reference.load_state_dict(model.state_dict())
    heads = [nn.Linear(16, 1) for _ in attributes]
    for index, head in enumerate(heads):
        nn.init.zeros_(head.bias).data.copy_(model.heads.bias[index : index + 1])
        head.weight.data.copy_(model.heads.weight[index : index + 1])

    gradients = Gradients()
    make_trainer(gradients, max_steps=1).fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    assert list(gradients.rows) == list(attributes)
    features = reference.train().backbone(batch["image"])
    for index, (name, head) in enumerate(zip(attributes, heads, strict=True)):
        probabilities = torch.sigmoid(head(features).squeeze(1))
        loss = F.binary_cross_entropy(probabilities, batch["attributes"][:, ATTRIBUTES.index(name)])
        loss.backward(retain_graph=True)
        flat = torch.cat([parameter.grad.flatten() for parameter in reference.backbone.parameters()])
        torch.testing.assert_close(gradients.rows[name], flat, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(gradients.heads["weight"][index], head.weight.grad[0], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(gradients.heads["bias"][index], head.bias.grad[0], atol=1e-6, rtol=1e-4)
        reference.backbone.zero_grad()


def f1_of(found, wanted):
    """(K,), from booleans (N, K)."""
    both = (found & wanted).sum(axis=0)
    return np.where(both > 0, 2 * both / np.maximum(found.sum(axis=0) + wanted.sum(axis=0), 1), 0.0)


def opinionated(**arguments):
    """A model whose logits have both signs, and which finds different attributes in different faces."""
    model = make_model(**arguments).eval()
    generator = torch.Generator().manual_seed(5)
    model.heads.weight.data = 1e3 * torch.randn(model.heads.weight.shape, generator=generator)
    model.heads.bias.data.zero_()
    return model


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize(
    "chosen",
    [{}, {"attributes": ("Male",)}, {"attributes": ("Young", "Male"), "single_task_f1": {"Male": 0.5, "Young": 0.25}}],
)
def test_f1_is_that_of_the_whole_split(make_trainer, data, stage, chosen):
    model, trainer = opinionated(**chosen), make_trainer()
    trainer.test(model, data, verbose=False) if stage == "test" else trainer.validate(model, data, verbose=False)
    batches = list(data.test_dataloader() if stage == "test" else data.val_dataloader())
    assert [len(batch["image"]) for batch in batches] == ([4, 1] if stage == "test" else [4, 3])
    columns = [ATTRIBUTES.index(name) for name in model.attributes]
    with torch.no_grad():
        found = np.concatenate([model.eval().predict_step(batch).numpy() for batch in batches]) > 0.5
    wanted = np.concatenate([batch["attributes"].numpy() for batch in batches])[:, columns] == 1
    scores = f1_of(found, wanted)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert [logged.pop(f"{stage}/{name}_f1") for name in model.attributes] == pytest.approx(list(scores))
    against = np.array([chosen.get("single_task_f1", SINGLE_TASK_F1)[name] for name in model.attributes])
    assert logged.pop(f"{stage}/mean_f1") == pytest.approx(scores.mean())
    assert logged.pop(f"{stage}/delta_m") == pytest.approx(100 * ((against - scores) / against).mean(), rel=1e-5)
    assert not logged
    assert len(chosen) or 0.1 < scores.mean() < 0.9


def test_it_learns(make_trainer, make_data):
    data = make_data(batch_size=12, image_size=16)
    data.prepare_data()
    data.setup("fit")
    attributes = ("Eyeglasses", "Blond_Hair", "Male")
    model = make_model(width=4, attributes=attributes, lr=3e-3, mtl_method=FairGrad(alpha=2.0))
    trainer, faces = make_trainer(max_epochs=50), data.train_dataloader()

    def score():
        return trainer.validate(model, faces, verbose=False)[0]["val/mean_f1"]

    before = score()
    trainer.fit(model, faces)
    assert score() > max(0.9, before + 0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attributes": []}, r"attributes=\[\] must name"),
        ({"attributes": ["Bald", "Bald"]}, "each once"),
        ({"attributes": ["Bold"]}, "'Bold'"),
        ({"width": 0}, "width=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"single_task_f1": {}}, "there is none for '5_o_Clock_Shadow'"),
        ({"attributes": ["Bald"], "single_task_f1": {"Bald": 0.0}}, r"single_task_f1\['Bald'\]=0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CelebAModel(**arguments)


def test_bars_show_the_scores_and_the_single_task_values():
    scores = {"Bald": 0.75, "Bangs": 0.25, "Young": 0.5}
    figure = bar_figure(scores, {"Young": 0.5, "Bald": 0.7, "Bangs": 0.875})
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == list(scores)
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in ax.patches}
    assert [bars[place].get_width() for place in range(3)] == list(scores.values())
    colors = [bars[place].get_facecolor() for place in range(3)]
    assert colors[0] == colors[2] != colors[1]
    assert ax.lines[0].get_xdata().tolist() == [0.7, 0.875, 0.5]
    assert "mean 0.500, single-task 0.692" in ax.get_xlabel()
    with pytest.raises(ValueError, match="must agree"):
        bar_figure(scores, {"Bald": 0.7})


def test_bars_are_drawn_and_change_nothing(make_trainer, data, tmp_path):
    def fit(*callbacks, **arguments):
        model = make_model(attributes=("Male", "Smiling"))
        trainer = make_trainer(*callbacks, max_epochs=2, **arguments)
        trainer.fit(model, data)
        return trainer, model.state_dict(), torch.get_rng_state()

    logger = TensorBoardLogger(tmp_path, "run")
    trainer, drawn, rng = fit(AttributeBars(every_n_epochs=2), logger=logger)
    _, plain, plain_rng = fit()
    assert all(torch.equal(drawn[name], plain[name]) for name in plain)
    assert torch.equal(rng, plain_rng)
    assert np.asarray(Image.open(Path(logger.log_dir) / "f1_val.png")).std() > 0
    logger.experiment.flush()
    assert steps_of_images(logger, "val/f1") == [trainer.global_step]
    trainer.test(trainer.lightning_module, data, verbose=False)
    assert (Path(logger.log_dir) / "f1_test.png").is_file()


def steps_of_images(logger, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return [event.step for event in events.Images(tag)]


def test_bars_go_where_they_are_asked_to(make_trainer, data, tmp_path):
    make_trainer(AttributeBars(tmp_path / "bars")).validate(opinionated(attributes=("Male",)), data, verbose=False)
    assert [path.name for path in (tmp_path / "bars").iterdir()] == ["f1_val.png"]


def test_bars_need_their_model(make_trainer):
    with pytest.raises(MisconfigurationException, match="got a BoringModel"):
        make_trainer(AttributeBars(), fast_dev_run=True).fit(BoringModel())
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        AttributeBars(every_n_epochs=0)
