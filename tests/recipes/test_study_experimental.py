"""Studies: the callbacks, triggers and objectives that are not part of the library."""

import pytest
import torch

from lightning_cost.gradients import TaskGradients
from lightning_cost.objectives import ConflictAlignment
from lightning_cost.surface import Point, Surface
from recipes.study.experimental import (
    CosineBelow,
    EpochTeleportCallback,
    LookAhead,
    LookAheadCallback,
    LowestCosines,
    OptionsOfMixin,
    RunningDirection,
    SmoothedTrigger,
    SoftMinimum,
)
from tests.support.nets import Net, fit, make_batches

pytestmark = pytest.mark.slow


def test_teleports_in_some_epochs_only():
    callback = EpochTeleportCallback({1, 3}, trigger=lambda gradients: True)
    fit(Net(), make_batches(3), max_epochs=5, callbacks=[callback])
    assert [report.epoch for report in callback.reports] == [1, 1, 1, 3, 3, 3]
    assert "[1, 3]" in repr(callback)


def test_a_smoothed_trigger_looks_at_the_running_mean():
    trigger = SmoothedTrigger(decay=0.5)
    opposed = TaskGradients(["a", "b"], torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))
    aligned = TaskGradients(["a", "b"], torch.tensor([[2.0, 0.0], [1.5, 0.0]]))
    # The second row of the mean: -1, 0.25, -0.375, 0.5625.
    assert [trigger(gradients) for gradients in (opposed, aligned, opposed, aligned)] == [True, False, True, False]
    with pytest.raises(ValueError, match="decay"):
        SmoothedTrigger(decay=1.0)


def with_cosine(cosine):
    """Two tasks, of which the small one has this cosine with a mean that the large one decides."""
    sine = (1 - cosine**2) ** 0.5
    return TaskGradients(["a", "b"], torch.tensor([[1e6, 0.0], [cosine, sine]]))


def test_the_lowest_cosines_are_those_below_the_running_quantile():
    trigger = LowestCosines(share=0.25, window=4)
    # Nothing to compare with in the first four. Then the lowest quarter of the last four, if there is a conflict.
    cosines = [-0.1, -0.2, -0.3, -0.4, -0.5, -0.35, 0.2, 0.3, 0.4, 0.5, 0.1, -0.1]
    fired = [trigger(with_cosine(cosine)) for cosine in cosines]
    assert [cosine for cosine, fires in zip(cosines, fired, strict=True) if fires] == [-0.5, -0.1]
    with pytest.raises(ValueError, match="share"):
        LowestCosines(share=0.0)
    with pytest.raises(ValueError, match="window"):
        LowestCosines(share=0.1, window=5)


def test_a_fixed_threshold_is_one():
    trigger = CosineBelow(-0.3)
    assert [trigger(with_cosine(cosine)) for cosine in (-0.4, -0.2, 0.5)] == [True, False, False]
    with pytest.raises(ValueError, match="threshold"):
        CosineBelow(0.1)


class Probe(LookAhead):
    """Compares the gradient with differences of the value, in double precision."""

    def __init__(self):
        super().__init__(steps=3.0, epsilon=1e-5)
        self.errors = []

    def value_and_gradient(self, surface, point):
        value, gradient = super().value_and_gradient(surface, point)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(len(gradient), generator=generator, dtype=gradient.dtype)
        direction /= direction.norm()
        ends = []
        for sign in (1, -1):
            with surface.displaced(direction, sign * 1e-5):
                losses, mean = surface.gradient(torch.full((3,), 1 / 3, dtype=gradient.dtype))
                matrix = mean.repeat(3, 1)
                ends.append(self.value(surface, Point(losses, TaskGradients(point.gradients.names, matrix))))
        slope = (ends[0] - ends[1]) / 2e-5
        self.errors.append(abs(slope - float(gradient @ direction)) / abs(slope))
        return value, gradient


def test_the_gradient_of_the_look_ahead():
    objective = Probe()
    callback = LookAheadCallback(objective, trigger=lambda gradients: True)
    batches = [{name: value.double() for name, value in batch.items()} for batch in make_batches(4)]
    fit(Net().double(), batches, max_epochs=2, callbacks=[callback], precision="64-true")
    assert len(objective.errors) == 4
    assert max(objective.errors) < 1e-3


def test_a_running_direction_averages_the_gradients_of_teleports(monkeypatch):
    seen, generator = [], torch.Generator().manual_seed(0)

    def random_gradient(self, surface, point):
        seen.append(torch.randn(5, generator=generator))
        return 0.5, seen[-1].clone()

    monkeypatch.setattr(ConflictAlignment, "value_and_gradient", random_gradient)
    monkeypatch.setattr(ConflictAlignment, "value", lambda self, surface, point: 0.5)
    objective = RunningDirection(decay=0.75, every=2)
    values, vectors = zip(*(objective.value_and_gradient(None, None) for _ in range(4)), strict=True)
    assert values == (0.5,) * 4
    assert len(seen) == 2
    torch.testing.assert_close(vectors[0], seen[0])
    torch.testing.assert_close(vectors[1], seen[0])
    torch.testing.assert_close(vectors[2], 0.75 * seen[0] + 0.25 * seen[1])
    torch.testing.assert_close(vectors[3], vectors[2])


def test_an_option_that_the_mixin_lacks_is_refused():
    with pytest.raises(ValueError, match=r"no options \['weights_evry'\]"):
        OptionsOfMixin(weights_evry=2)


def test_a_soft_minimum_climbs_along_the_weighted_cosines(monkeypatch):
    monkeypatch.setattr("recipes.study.experimental.EPSILON", 1e-6)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    matrices = torch.randn(3, 4, 4, dtype=torch.float64)

    def losses():
        return {name: (weight @ matrix).pow(2).sum().sin() for name, matrix in zip("abc", matrices, strict=True)}

    surface, objective = Surface(losses, [weight]), SoftMinimum(temperature=0.5)
    start = surface.point()
    weights = torch.softmax(-start.gradients.cosines / 0.5, dim=0)
    value, gradient = objective.value_and_gradient(surface, start)
    assert value == pytest.approx(float(start.gradients.cosines.min()))
    expected = []
    for direction in torch.eye(4, dtype=torch.float64):
        ends = []
        for length in (1e-5, -1e-5):
            with surface.displaced(direction, length):
                ends.append(float(weights @ surface.point().gradients.cosines))
        expected.append((ends[0] - ends[1]) / 2e-5)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-3)
