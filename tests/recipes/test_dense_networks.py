"""SegNet and MTAN: sizes as published, attention against what it must reduce to, and teleports of their trunks."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_cost import LevelSetSearch, MultiTaskMixin, PenaltySearch
from lightning_cost._training.shared import shared_modules, shared_parameters
from recipes.dense.losses import depth_loss, normals_loss, segmentation_loss
from recipes.dense.mtan import Mtan
from recipes.dense.segnet import SegNet
from tests.support.nets import fit
from tests.support.teleporting import teleporter

pytestmark = pytest.mark.slow

NYUV2 = {"segmentation": 13, "depth": 1, "normals": 3}
CITYSCAPES = {"segmentation": 7, "depth": 1}
TINY = (4, 6, 8, 10, 8)  # no two neighbors alike

both_networks = pytest.mark.parametrize("kind", [SegNet, Mtan])


def tiny(kind: type[nn.Module], tasks: Mapping[str, int] = NYUV2) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(tasks, TINY)


def images(size: int = 2, height: int = 32, width: int = 64) -> Tensor:
    return torch.rand(size, 3, height, width, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("kind", "tasks", "millions"),
    [(SegNet, NYUV2, 25.06), (SegNet, CITYSCAPES, 25.02), (Mtan, NYUV2, 44.23), (Mtan, CITYSCAPES, 41.21)],
)
def test_parameters_are_as_many_as_published(kind: type[nn.Module], tasks: Mapping[str, int], millions: float) -> None:
    with torch.device("meta"):
        network = kind(tasks)
    assert round(count(network) / 1e6, 2) == millions


def test_parts_have_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        single, multi, network = SegNet({"segmentation": 13}), SegNet(NYUV2), Mtan(NYUV2)
    assert count(single) == 24_981_069  # the constant in the public code of MTAN
    assert round(count(network.attention) / 1e6, 2) == 8.95
    assert count(network.heads) == count(multi.heads)
    assert count(network) == count(network.trunk) + count(network.attention) + count(network.heads)
    assert count(multi) == count(multi.trunk) + count(multi.heads)


@both_networks
@pytest.mark.parametrize("tasks", [NYUV2, CITYSCAPES, {"normals": 3}])
def test_every_task_gets_a_prediction_of_the_size_of_the_image(kind: type[nn.Module], tasks: Mapping[str, int]) -> None:
    predictions = tiny(kind, tasks)(images())
    assert {task: tuple(value.shape) for task, value in predictions.items()} == {
        task: (2, channels, 32, 64) for task, channels in tasks.items()
    }
    if "normals" in tasks:
        check_normals(predictions["normals"])


def check_normals(normals: Tensor) -> None:
    """Of unit length, except where so narrow a network has no feature at all."""
    lengths = normals.norm(dim=1)
    assert (lengths > 0).float().mean() > 0.99
    assert_close(lengths[lengths > 0], torch.ones(int((lengths > 0).sum())))


def test_unpooling_puts_values_back_to_where_the_maxima_were() -> None:
    encoder, decoder = tiny(SegNet).trunk(images())
    for (_, before), (unpooled, _), pooled in zip(
        reversed(encoder), decoder, [F.max_pool2d(encoder[-1][1], 2), *(last for _, last in decoder)], strict=False
    ):
        assert_close(F.max_pool2d(unpooled, 2), pooled, rtol=0, atol=0)
        maxima = F.interpolate(F.max_pool2d(before, 2), scale_factor=2)
        assert_close(before[unpooled > 0], maxima[unpooled > 0], rtol=0, atol=0)


def predicted_by_hand(network: Mtan, task: str, image: Tensor) -> Tensor:
    """One task through one stage after the other, with the layers of the network and nothing else of it."""
    trunk, attention = network.trunk, network.attention[task]
    pool, unpool, enlarge = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), nn.UpsamplingBilinear2d
    shared, selected, maxima = image, None, []
    for s in range(5):
        first = trunk.encoder[s].first(shared)
        last = trunk.encoder[s].rest(first)
        shared, positions = pool(last)
        maxima.append(positions)
        mask = attention.encoder[s](first if s == 0 else torch.cat([first, selected], dim=1))
        selected, _ = pool(trunk.encoder_filters[s](mask * last))
    for s in range(5):
        unpooled = unpool(shared, maxima[4 - s])
        shared = trunk.decoder[s].rest(trunk.decoder[s].first(unpooled))
        filtered = trunk.decoder_filters[s](enlarge(scale_factor=2)(selected))
        selected = attention.decoder[s](torch.cat([unpooled, filtered], dim=1)) * shared
    return network.heads[task](selected)


def test_mtan_is_what_its_stages_are_by_hand() -> None:
    network = tiny(Mtan)
    for task, prediction in network(images()).items():
        assert_close(prediction, predicted_by_hand(network, task, images()))


def set_masks(network: Mtan, task: str, logit: float) -> None:
    for mask in (*network.attention[task].encoder, *network.attention[task].decoder):
        nn.init.zeros_(mask[-2].weight)
        nn.init.constant_(mask[-2].bias, logit)


def test_attention_to_everything_is_a_plain_segnet_and_to_nothing_is_blind() -> None:
    plain, network = tiny(SegNet), tiny(Mtan)
    plain.trunk.load_state_dict({key: network.trunk.state_dict()[key] for key in plain.trunk.state_dict()})
    plain.heads.load_state_dict(network.heads.state_dict())
    set_masks(network, "segmentation", 100.0)
    set_masks(network, "depth", -1000.0)
    expected, predictions = plain(images()), network(images())
    assert_close(predictions["segmentation"], expected["segmentation"])
    assert_close(predictions["depth"], torch.zeros(2, 1, 32, 64))  # biases are zero at first
    assert not torch.allclose(predictions["normals"], expected["normals"], atol=0.1)


@both_networks
def test_a_task_moves_the_trunk_and_what_belongs_to_it(kind: type[nn.Module]) -> None:
    network = tiny(kind)
    for task in NYUV2:
        network.zero_grad()
        network(images())[task].square().mul(torch.rand(32, 64)).sum().backward()
        for name, parameter in network.named_parameters():
            part, owner = name.split(".")[:2]
            assert (parameter.grad is not None) == (part == "trunk" or owner == task), name


@both_networks
def test_normals_without_a_direction_are_zero_and_move_nothing(kind: type[nn.Module]) -> None:
    network = tiny(kind)
    last = network.heads["normals"][1]
    nn.init.zeros_(last.weight)
    normals = network(images())["normals"]
    normals.sum().backward()
    assert not normals.any()
    assert not any(parameter.grad.any() for parameter in network.parameters() if parameter.grad is not None)


@both_networks
@pytest.mark.parametrize("change", ["channels_last", "not in place"])
def test_neither_memory_format_nor_in_place_operations_change_the_gradients(kind: type[nn.Module], change: str) -> None:
    network = tiny(kind).double()
    other = copy.deepcopy(network)
    if change == "channels_last":
        other = other.to(memory_format=torch.channels_last)
    else:
        relus = [module for module in other.modules() if isinstance(module, nn.ReLU)]
        assert all(relu.inplace for relu in relus)
        for relu in relus:
            relu.inplace = False
    for net in (network, other):
        sum(prediction.sin().sum() for prediction in net(images().double()).values()).backward()
    gradients = [[parameter.grad for parameter in net.parameters()] for net in (network, other)]
    assert_close(*gradients)


@both_networks
def test_predictions_under_autocast_are_finite(kind: type[nn.Module]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        predictions = tiny(kind)(images())
    assert all(prediction.isfinite().all() for prediction in predictions.values())
    check_normals(predictions["normals"])


@both_networks
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 48, 64), (2, 3, 32, 100)])
def test_images_of_another_shape_are_refused(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}") + r".* \(B, 3, H, W\) .* multiples of 32"):
        tiny(kind)(torch.rand(shape))


@both_networks
@pytest.mark.parametrize(
    ("tasks", "widths", "message"),
    [
        (NYUV2, (4, 4, 4, 4), r"widths=\(4, 4, 4, 4\) must be 5 positive numbers"),
        (NYUV2, (4, 4, 4, 4, 0), r"widths=\(4, 4, 4, 4, 0\) must be 5 positive"),
        ({}, TINY, r"tasks=\{\} must map"),
        ({"depth": 0}, TINY, r"tasks=\{'depth': 0\} .* at least 1"),
    ],
)
def test_bad_arguments_are_refused(
    kind: type[nn.Module], tasks: Mapping[str, int], widths: Sequence[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(tasks, widths)


class Dense(MultiTaskMixin, L.LightningModule):
    """Three tasks by one of the networks."""

    def __init__(self, network: nn.Module, shared: str | list[str]) -> None:
        super().__init__()
        self.shared_module = shared
        self.network = network

    def task_losses(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        predictions = self.network(batch["image"])
        losses = {"segmentation": segmentation_loss, "depth": depth_loss, "normals": normals_loss}
        return {task: loss(predictions[task], batch[task]) for task, loss in losses.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def random_batches(number: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(2, 3, 32, 64, generator=generator),
            "segmentation": torch.randint(-1, 13, (2, 32, 64), generator=generator),
            "depth": 5 * torch.rand(2, 1, 32, 64, generator=generator),
            "normals": F.normalize(torch.randn(2, 3, 32, 64, generator=generator), dim=1),
        }
        for _ in range(number)
    ]


@pytest.mark.filterwarnings("error:Teleports take steps in")
@pytest.mark.parametrize(
    ("kind", "shared", "search"),
    [
        (SegNet, "network.trunk", LevelSetSearch()),
        (SegNet, "network.trunk", PenaltySearch(steps=2)),
        (Mtan, "network.trunk", LevelSetSearch()),
        (Mtan, ["network.trunk", "network.attention"], LevelSetSearch()),
    ],
    ids=["SegNet", "SegNet by PEFT", "MTAN", "MTAN with shared attention"],
)
def test_teleports_reach_every_convolution_that_is_shared(
    kind: type[nn.Module], shared: str | list[str], search: LevelSetSearch | PenaltySearch
) -> None:
    module = Dense(tiny(kind), shared)
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in module.named_parameters()}
    modules = shared_modules(module)
    convolutions = [
        layer.weight for part in modules.values() for layer in part.modules() if isinstance(layer, nn.Conv2d)
    ]
    reached = search.reach(modules, shared_parameters(module))
    assert {id(weight) for weight in reached} == {id(weight) for weight in convolutions}

    callback = teleporter(search=search)
    steps = 3 if isinstance(search, LevelSetSearch) else 1
    # In single precision it depends on the machine which teleports of so small a network succeed.
    fit(module, random_batches(steps), callbacks=[callback], precision="64-true")
    assert len(callback.reports) == steps
    assert all(report.accepted or "does not grow" in report.reason for report in callback.reports)
    if isinstance(search, LevelSetSearch):
        accepted = [report for report in callback.reports if report.accepted]
        assert accepted
        for report in accepted:
            assert min(report.cosines_after.values()) > min(report.cosines_before.values())
    assert {name: (id(p), p.requires_grad) for name, p in module.named_parameters()} == before
    assert all(value.isfinite().all() for value in module.state_dict().values())
