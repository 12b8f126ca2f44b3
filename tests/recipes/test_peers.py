"""Other ways to teleport keep what they say they keep, and ascend the objective."""

import pytest
import torch
from torch import nn

from lightning_cost import ConflictAlignment, Surface, Teleporter
from lightning_cost.searches import SearchContext
from recipes.peers import GroupActionSearch, NullSpaceSearch, RescalingSearch, free_shares
from recipes.peers.rescaling import scaled_units

TASKS = ("left", "right")


def mlp(activation):
    return nn.Sequential(nn.Linear(6, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 4))


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(32, 4)),
    )


class Case:
    """A network in double precision with two conflicting tasks on a batch."""

    def __init__(self, network, shape, samples=10):
        torch.manual_seed(0)
        self.network = network.double()
        self.inputs = torch.randn(samples, *shape, dtype=torch.double)
        self.unseen = torch.randn(50, *shape, dtype=torch.double)
        targets = torch.randn(2, samples, 4, dtype=torch.double)

        def losses():
            outputs = network(self.inputs)
            return {"left": (outputs - targets[0]).square().mean(), "right": (outputs + targets[0]).square().mean()}

        self.surface = Surface(losses, list(network.parameters()))
        self.start = self.surface.point()
        self.modules = {"shared": network}

    def outputs(self, inputs=None):
        with torch.no_grad():
            return self.network(self.inputs if inputs is None else inputs)

    def context(self, objective=None):
        return SearchContext(
            surface=self.surface,
            start=self.start,
            origin=self.surface.position(),
            objective=objective or ConflictAlignment(),
            invariance="per_task",
            modules=self.modules,
            learning_rate=1e-3,
            record=lambda *args, **kwargs: None,
        )


def relu_mlp():
    return Case(mlp(nn.ReLU), (6,))


def leaky_mlp():
    return Case(mlp(nn.LeakyReLU), (6,))


def convolutions():
    return Case(cnn(), (1, 4, 4), samples=3)


SEARCHES = [
    (relu_mlp, RescalingSearch),
    (relu_mlp, lambda: RescalingSearch("gradient")),
    (convolutions, lambda: RescalingSearch("gradient")),
    (leaky_mlp, GroupActionSearch),
    (relu_mlp, NullSpaceSearch),
    (convolutions, NullSpaceSearch),
]


@pytest.mark.parametrize(("make_case", "make_search"), SEARCHES)
def test_every_candidate_keeps_the_outputs_on_the_batch(make_case, make_search):
    case, search = make_case(), make_search()
    before, position = case.outputs(), case.surface.position()
    count = 0
    for _ in search.candidates(case.context()):
        torch.testing.assert_close(case.outputs(), before, rtol=1e-9, atol=1e-9)
        assert (case.surface.position() - position).norm() > 1e-3
        count += 1
    assert count == 4


@pytest.mark.parametrize("make_case", [relu_mlp, convolutions])
@pytest.mark.parametrize("direction", ["random", "gradient"])
def test_rescaling_keeps_the_outputs_everywhere(make_case, direction):
    case = make_case()
    before = case.outputs(case.unseen)
    for _ in RescalingSearch(direction).candidates(case.context()):
        torch.testing.assert_close(case.outputs(case.unseen), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make_search", [GroupActionSearch, NullSpaceSearch])
def test_the_others_keep_them_on_the_batch_only(make_search):
    case = leaky_mlp()
    before = case.outputs(case.unseen)
    next(make_search().candidates(case.context()))
    assert (case.outputs(case.unseen) - before).abs().max() > 1e-4


@pytest.mark.parametrize(("make_case", "make_search"), SEARCHES[1:])
def test_the_direction_ascends_the_objective(make_case, make_search):
    # The last and shortest candidate, along its direction.
    case = make_case()
    objective, start = ConflictAlignment(), case.start
    value = objective.value(case.surface, start)
    for _ in make_search().candidates(case.context(objective)):
        pass
    assert objective.value(case.surface, case.surface.point()) > value


def test_a_teleporter_accepts_them():
    case = relu_mlp()
    outcome = Teleporter(ConflictAlignment(), RescalingSearch("gradient")).run(case.surface, case.modules, case.start)
    assert outcome.accepted
    assert outcome.end.gradients.cosines.min() > outcome.start.gradients.cosines.min()
    torch.testing.assert_close(outcome.end.losses, outcome.start.losses, rtol=1e-9, atol=0)


def test_the_share_that_is_free_is_what_the_inputs_leave():
    # 10 samples of 6 features leave nothing in the first layer. Later, 10 samples span 10 of 24 units.
    shares = free_shares(leaky_mlp().context())
    assert shares["shared.0"] == pytest.approx(0, abs=1e-9)
    assert shares["shared.2"] == pytest.approx(14 / 24)
    assert shares["shared.4"] == pytest.approx(14 / 24)


def test_nothing_is_free_where_the_inputs_span_all():
    case = Case(mlp(nn.ReLU), (6,), samples=400)
    context = case.context()
    first = case.network[0]
    for parameter in case.network.parameters():
        parameter.requires_grad_(parameter is first.weight)
    case.surface = Surface(
        lambda: {name: case.network(case.inputs).square().mean() * (index + 1) for index, name in enumerate(TASKS)},
        [first.weight],
    )
    case.start = case.surface.point()
    assert list(NullSpaceSearch().candidates(case.context())) == []
    assert context.modules["shared"] is case.network


def test_units_across_pooling_and_flattening_are_found():
    units = scaled_units({"shared": cnn()})
    assert [each.count for each in units] == [6, 8]
    assert units[1].by_unit(units[1].second.weight).shape == (4, 8, 4)


@pytest.mark.parametrize(
    ("search", "network", "message"),
    [
        (RescalingSearch(), mlp(nn.Tanh), "RescalingSearch needs"),
        (GroupActionSearch(), mlp(nn.ReLU), "needs an `nn.Sequential`"),
        (NullSpaceSearch(), nn.LSTM(3, 3), "reaches no weight"),
    ],
)
def test_networks_that_they_cannot_change_are_refused(search, network, message):
    with pytest.raises(ValueError, match=message):
        search.reach({"shared": network}, list(network.parameters()))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: RescalingSearch("uphill"), "direction"),
        (lambda: RescalingSearch(spread=0), "spread"),
        (lambda: RescalingSearch(tries=0), "tries"),
        (lambda: GroupActionSearch(size=0), "size"),
        (lambda: NullSpaceSearch(size=0), "size"),
        (lambda: NullSpaceSearch(cutoff=1), "cutoff"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
