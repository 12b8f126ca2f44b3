"""The teleports of a fit: which shared parameters they reach, and what they do to the optimizer."""

from __future__ import annotations

import lightning as L
import pytest
from torch import Tensor, nn

from lightning_cost import LevelSetSearch, PenaltySearch
from lightning_cost._training.shared import shared_parameters
from tests.support.nets import Batch, Net, fit, make_batches, make_mlp
from tests.support.teleporting import teleporter


class OddLayers(Net):
    """With layers that PEFT cannot change or would change wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "plain": make_mlp(5, 4),
                "normed": nn.utils.parametrizations.weight_norm(make_mlp(4, 4)[0]),
                "grouped": nn.Conv1d(4, 4, 1, groups=2),
                "recurrent": nn.GRU(4, 4, batch_first=True),
                "attention": nn.MultiheadAttention(4, 1, batch_first=True),
                "padded": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
            }
        )

    def features(self, batch: Batch) -> Tensor:
        layers = self.backbone
        x = layers["normed"](layers["plain"](batch["x"]).tanh())[:, :, None]
        x = layers["padded"](layers["grouped"](x).expand(-1, -1, 3)).transpose(1, 2)
        x = layers["recurrent"](x)[0]
        return layers["attention"](x, x, x, need_weights=False)[0].mean(dim=1)


def test_layers_out_of_reach_are_listed_once() -> None:
    module, callback = OddLayers(), teleporter(search=PenaltySearch(steps=2, lr=1e-3))
    with pytest.warns(UserWarning, match="Teleports take steps") as caught:
        fit(module, make_batches(3), callbacks=[callback])
    (message,) = (str(warning.message) for warning in caught if "Teleports take steps" in str(warning.message))
    for left_out in (
        "backbone.normed.parametrizations.weight (ParametrizationList)",
        "backbone.grouped (Conv1d)",
        "backbone.recurrent (GRU)",
        "backbone.attention (MultiheadAttention)",
    ):
        assert left_out in message
    assert "plain" not in message
    assert "padded" not in message
    # 20 + 16 + 48 elements of the weights of the plain, projecting and padded layers.
    total = sum(parameter.numel() for parameter in shared_parameters(module))
    assert f"{84 / total:.0%} of the shared parameters" in message


@pytest.mark.filterwarnings("error:Teleports take steps")
def test_the_level_set_search_reaches_them_all() -> None:
    callback = teleporter()
    fit(OddLayers(), make_batches(4), callbacks=[callback])
    assert any(report.accepted for report in callback.reports)


def test_a_small_share_of_the_parameters_warns() -> None:
    callback = teleporter(search=LevelSetSearch(target_modules=["backbone.2"]))
    with pytest.warns(UserWarning, match="in 38% of the shared parameters"):
        fit(Net(), make_batches(2), callbacks=[callback])


def test_the_optimizer_is_left_without_a_hook() -> None:
    optimizers = []

    class Keep(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            optimizers.append(trainer.optimizers[0])
            assert len(trainer.optimizers[0]._optimizer_step_pre_hooks) == 1

    fit(Net(), make_batches(2), callbacks=[teleporter(), Keep()])
    (optimizer,) = optimizers
    assert not optimizer._optimizer_step_pre_hooks
