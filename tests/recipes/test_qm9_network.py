"""The dense network is torch_geometric's, adapters reach all of its matrices, and it can be differentiated twice."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from lightning_cost.searches import LevelSetSearch
from lightning_cost.searches._adapters import reachable_layers
from recipes.qm9.network import MoleculeNet
from recipes.qm9.reach import ends, no_recurrent_cells


def molecules(batch=6, atoms=9, seed=0):
    """Random graphs of different sizes, padded to the largest."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, atoms + 1, (batch,), generator=generator)
    sizes[0], sizes[1] = atoms, 1
    mask = torch.arange(atoms) < sizes.unsqueeze(1)
    elements = torch.randint(5, (batch, atoms), generator=generator, dtype=torch.uint8) * mask
    bonds = torch.randint(-4, 5, (batch, atoms, atoms), generator=generator).clamp(min=0).triu(1)
    bonds = ((bonds + bonds.mT) * (mask.unsqueeze(1) & mask.unsqueeze(2))).to(torch.uint8)
    positions = 2 * torch.randn(batch, atoms, 3, generator=generator) * mask.unsqueeze(2)
    return {"elements": elements, "bonds": bonds, "positions": positions, "mask": mask}


def test_outputs_and_task_gradients_are_those_of_torch_geometric():
    pytest.importorskip("torch_geometric")
    from recipes.qm9.reference import GeometricNet, as_one_graph

    torch.manual_seed(0)
    net, heads, batch = MoleculeNet(8, 6), nn.Linear(8, 11), molecules()
    reference = GeometricNet(net)
    features, expected = net(**batch), reference(*as_one_graph(**batch))
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=1e-5)

    def gradients(module, features, task):
        loss = heads(features)[:, task].pow(2).mean()
        values = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        return dict(zip(dict(module.named_parameters()), values, strict=True))

    for task in range(11):
        found, wanted = gradients(net, features, task), gradients(reference, expected, task)
        scale = max(gradient.abs().max() for gradient in found.values())
        assert GeometricNet.names.keys() == wanted.keys()
        assert set(GeometricNet.names.values()) == found.keys()
        for theirs, ours in GeometricNet.names.items():
            torch.testing.assert_close(found[ours] / scale, wanted[theirs] / scale, atol=1e-5, rtol=0)


def test_the_network_has_the_published_size():
    heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(11))
    count = sum(parameter.numel() for module in (MoleculeNet(), heads) for parameter in module.parameters())
    assert round(count / 1e6, 3) == 0.618


def test_padding_changes_nothing():
    torch.manual_seed(0)
    net, batch = MoleculeNet(8, 6), molecules()
    small = {name: value[3:4] for name, value in batch.items()}
    size = int(small["mask"].sum())
    assert size < small["mask"].shape[1]
    trimmed = {name: value[:, :size, :size] if name == "bonds" else value[:, :size] for name, value in small.items()}
    garbage = small | {"positions": torch.where(small["mask"].unsqueeze(2), small["positions"], torch.tensor(7.0))}
    torch.testing.assert_close(net(**trimmed), net(**batch)[3:4])
    torch.testing.assert_close(net(**garbage), net(**batch)[3:4])


def test_the_order_of_the_atoms_does_not_matter():
    torch.manual_seed(0)
    net, batch = MoleculeNet(8, 6), {name: value[:1] for name, value in molecules().items()}
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value[:, order] for name, value in batch.items()}
    shuffled["bonds"] = shuffled["bonds"][:, :, order]
    torch.testing.assert_close(net(**shuffled), net(**batch))


def test_adapters_reach_every_matrix():
    net = MoleculeNet(8, 6)
    matrices = {name for name, parameter in net.named_parameters() if parameter.ndim > 1}
    modules, shared = {"backbone": net}, list(net.parameters())
    by_id = {id(parameter): name for name, parameter in net.named_parameters()}
    layers = reachable_layers(modules, shared, LoraConfig(r=5))
    assert {by_id[id(layer.weight)] for layer in layers} == matrices
    assert {by_id[id(parameter)] for parameter in LevelSetSearch().reach(modules, shared)} == matrices


def test_it_can_be_differentiated_twice():
    torch.manual_seed(0)
    net = MoleculeNet(4, 3).double()
    batch = molecules(batch=2, atoms=4)
    batch["positions"] = batch["positions"].double()
    parameters = dict(net.named_parameters())
    values = tuple(parameters.values())

    def loss(*tensors):
        return torch.func.functional_call(net, dict(zip(parameters, tensors, strict=True)), kwargs=batch).pow(2).mean()

    assert torch.autograd.gradgradcheck(
        loss, tuple(value.detach().requires_grad_() for value in values), fast_mode=True
    )


@pytest.mark.parametrize("argument", ["width", "edge_hidden", "rounds", "reads"])
def test_there_must_be_something_of_everything(argument):
    with pytest.raises(ValueError, match=f"{argument}=0"):
        MoleculeNet(**{argument: 0})


def test_teleports_of_a_part_reach_that_part_only():
    net = MoleculeNet(8, 6)
    modules, shared = {"backbone": net}, list(net.parameters())
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    reached = {
        make: {names[id(parameter)] for parameter in make(None, 0)._teleporter.search.reach(modules, shared)}
        for make in (ends, no_recurrent_cells)
    }
    assert reached[ends] == {"embedding.weight", "out.weight"}
    recurrent = {name for name in names.values() if name.startswith(("update", "readout")) and name.endswith("weight")}
    weights = {name for name in names.values() if name.endswith("weight")}
    assert reached[no_recurrent_cells] == weights - recurrent
