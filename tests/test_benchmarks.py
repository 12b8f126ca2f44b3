"""The benchmarks share their networks and Trainers: a change for one must not break another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Parameter

from benchmarks import ddp, many, networks, peers, sharpness, step, teleport
from lightning_cost import Surface

pytestmark = pytest.mark.slow


def test_every_variant_of_a_step_trains() -> None:
    tiny = networks.Network(networks.NETWORKS["resnet18"].make, 2, (8, 8))
    for name, variant in step.VARIANTS.items():
        measured = step.Measured(name, tiny, 3, "cpu")
        measured.variant = step.Variant(variant.make, variant.attributes, variant.callback)
        assert measured.train(2) > 0, name


def test_variants_of_ddp_can_be_made() -> None:
    assert all(isinstance(model, step.Base) for model, _ in ddp.variants().values())
    trainer = step.bare_trainer(devices=2, strategy="ddp")
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.num_devices == 2
    assert [len(batch) for batch in ddp.Share(ddp.NETWORK, 2)] == [ddp.NETWORK.batch_size // 2] * 2


def test_every_setting_of_a_teleport_can_be_made() -> None:
    for row in teleport.settings():
        row.objective()
        row.search()


def test_a_peer_keeps_the_losses_and_everything_is_put_back() -> None:
    case = peers.CASES["mlp-relu"]
    ((model, surface, start, held_out),) = many.events(
        "digits:balanced,num_train=256", seed=0, count=1, earliest=4, apart=1, change=case.change
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    row = next(setting for setting in case.settings if setting.name == "rescaling, random")
    tried = peers.try_setting(row, model, surface, start, held_out[:1], plain=1.0)
    assert tried.accepted
    assert max(tried.drift, tried.drift_held_out) < 1e-4
    assert tried.after != tried.before
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    table = peers.table_of("", {row.name: [tried]})
    assert table.row_count == 1


def test_tasks_of_the_steps_agree() -> None:
    torch.manual_seed(0)
    network = networks.NETWORKS["resnet18"].make(3)
    rows = torch.cat([head.weight for head in network.heads])  # type: ignore[union-attr]
    assert bool((rows > 0).float().mean() > 0.99)


def test_events_of_many_tasks_leave_training_as_it_was() -> None:
    problem = "digits:many,num_train=128"
    row = many.settings()[0]

    def losses(tries: bool) -> list[list[float]]:
        seen = []
        for model, surface, start, held_out in many.events(problem, seed=0, count=2, earliest=1, apart=2):
            seen.append(start.losses.tolist())
            if tries:
                tried = many.try_setting(row, model, surface, start, held_out[:1])
                assert tried.cost > 0
                followed = many.follow(surface, start)
                assert followed[0.25].drift_after_chord < followed[2.0].drift_after_chord
                many.table_of_settings({row.name: [tried]}, "")
                many.table_of_lengths([followed], "")
        return seen

    assert losses(tries=True) == losses(tries=False)


def test_sharpness_of_a_quadratic_is_what_it_is_by_hand() -> None:
    curvatures = torch.tensor([4.0, 1.0, -1.0])
    theta = Parameter(torch.tensor([0.0, 0.0, 3.0]))
    surface = Surface(lambda: {"a": 0.5 * (curvatures * theta.square()).sum(), "b": theta.sum() * 0}, [theta])
    weights = torch.tensor([1.0, 0.0])
    assert sharpness.hessian_trace(surface, weights) == pytest.approx(4.0, abs=0.05)
    # At -4.5 with slope -3 along the last axis. Upwards, 2 e^2 - 0.5 z^2 - 3 z is largest at z = -0.6, e = 0.8.
    assert sharpness.exact_sharpness(surface, weights, -4.5, radius=1.0) == pytest.approx(3.5, abs=1e-3)


def test_correlations_are_those_of_ranks_for_each_seed() -> None:
    numbers = [(1.0, 0.1, 3.0), (5.0, 0.2, 2.0), (7.0, 9.0, 1.0)]
    values = [
        sharpness.Value(seed, 0, "loss", 0.05, 5, sampled=sampled, norm=norm, loss=loss, exact=0.0, trace=1.0)
        for seed in (0, 1)
        for sampled, norm, loss in numbers
    ]
    assert sharpness.by_seed(values, "norm") == pytest.approx([1.0, 1.0], abs=1e-5)
    assert sharpness.by_seed(values, "loss") == pytest.approx([-1.0, -1.0], abs=1e-5)


def test_points_of_sharpness_leave_training_as_it_was(tmp_path: Path) -> None:
    def losses(measures: bool) -> list[list[float]]:
        seen = []
        for step_, surface, start in sharpness.points("digits:narrow,num_train=128", seed=0, count=2, every=2):
            seen.append(start.losses.tolist())
            if measures:
                values = sharpness.measure(0, step_, surface, start, (0.05,))
                assert len(values) == 2 * len(sharpness.SAMPLES)
                sharpness.table_of(values, "")
                sharpness.draw(tmp_path / "values.png", values)
                assert (tmp_path / "values.png").stat().st_size > 0
                assert all(value.sampled <= value.exact * 1.01 for value in values if value.form == "difference")
        return seen

    assert losses(measures=True) == losses(measures=False)
