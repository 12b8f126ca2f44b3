"""Batches of molecules: against one molecule after another, split by a seed, resumable."""

from itertools import chain, islice
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.qm9.assemble import assemble
from recipes.qm9.cache import load_cache
from recipes.qm9.data import QM9DataModule
from recipes.qm9.molecules import MoleculeTensors
from recipes.qm9.source import CHECKSUMS, read_rows
from recipes.qm9.targets import TARGETS
from tests.support.nets import make_trainer
from tests.support.qm9_package import ROWS, install, many_rows

NUM = 60
SIZES = {"num_val": 9, "num_test": 13}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """The file of 60 molecules, whose dipoles are 1 to 60."""
    folder = tmp_path_factory.mktemp("qm9")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, folder / "site", many_rows(NUM))
        QM9DataModule(cache_dir=folder).prepare_data()
        checksums = dict(CHECKSUMS)
    return folder, checksums


@pytest.fixture
def make(cache_dir, monkeypatch):
    """Makes data modules that are set up."""
    folder, checksums = cache_dir
    for name, checksum in checksums.items():
        monkeypatch.setitem(CHECKSUMS, name, checksum)

    def made(**arguments):
        data = QM9DataModule(cache_dir=folder, **{"batch_size": 8, **SIZES, **arguments})
        data.setup("fit")
        return data

    return made


def dipoles(loader) -> list[int]:
    """Which molecules a loader serves, in its order."""
    return torch.cat([batch["targets"][:, 0] for batch in loader]).int().tolist()


def splits(data) -> dict[str, list[int]]:
    return {split: dipoles(getattr(data, f"{split}_dataloader")()) for split in ("train", "val", "test")}


@pytest.mark.parametrize("rows", [[0], [2], [17, 0, 16], [5, 5], list(range(18))])
def test_a_batch_is_its_molecules_one_after_another(rows):
    molecules = assemble(read_rows(ROWS))
    columns = [3, 18, 0]
    batch = MoleculeTensors(molecules, columns).batch(torch.tensor(rows))
    size = max(molecules.num_atoms[rows])
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
    assert shapes == {
        "elements": ((len(rows), size), torch.uint8),
        "bonds": ((len(rows), size, size), torch.uint8),
        "positions": ((len(rows), size, 3), torch.float32),
        "mask": ((len(rows), size), torch.bool),
        "targets": ((len(rows), 3), torch.float32),
    }
    for place, row in enumerate(rows):
        atoms, bonds = molecules.num_atoms[row], molecules.num_bonds[row]
        first_atom, first_bond = molecules.num_atoms[:row].sum(dtype=int), molecules.num_bonds[:row].sum(dtype=int)
        elements, positions, matrix = np.zeros(size), np.zeros((size, 3), np.float32), np.zeros((size, size))
        elements[:atoms] = molecules.elements[first_atom : first_atom + atoms]
        positions[:atoms] = molecules.positions[first_atom : first_atom + atoms]
        for bond in range(first_bond, first_bond + bonds):
            one, other = molecules.bond_atoms[bond]
            matrix[one, other] = matrix[other, one] = molecules.bond_orders[bond]
        assert np.array_equal(batch["elements"][place], elements)
        assert np.array_equal(batch["positions"][place], positions)
        assert np.array_equal(batch["bonds"][place], matrix)
        assert batch["mask"][place].tolist() == [True] * atoms + [False] * (size - atoms)
        assert np.array_equal(batch["targets"][place], molecules.targets[row, columns])


def test_the_splits_partition_the_molecules(make):
    data = make(batch_size=1)
    parts = splits(data)
    assert {split: len(part) for split, part in parts.items()} == {"train": 38, "val": 9, "test": 13}
    assert sorted(chain.from_iterable(parts.values())) == list(range(1, NUM + 1))
    order = (np.random.default_rng(0).permutation(NUM) + 1).tolist()
    assert (parts["test"], parts["val"]) == (order[:13], order[13:22])
    assert parts["train"] != order[22:]


def test_the_seed_alone_decides_the_split(make):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = splits(make()), splits(make(shuffle_seed=1, batch_size=4)), splits(make(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (first["val"], first["test"]) == (again["val"], again["test"])
    assert first["train"] != again["train"]
    assert not set(first["train"]) & set(again["val"] + again["test"])
    assert other["test"] != first["test"]


def test_a_subset_has_the_test_molecules_of_all(make):
    whole, part = splits(make(batch_size=1)), splits(make(batch_size=1, num_molecules=40))
    assert (part["test"], part["val"]) == (whole["test"], whole["val"])
    assert len(part["train"]) == 18
    assert set(part["train"]) < set(whole["train"])


def test_statistics_are_those_of_the_training_molecules(make):
    data = make(targets=("mu", "U0", "G_atom"), num_molecules=50)
    rows = np.random.default_rng(0).permutation(NUM)[22:50]
    targets = load_cache(data.cache_dir).targets.astype(float)[rows][:, [0, 7, 15]]
    assert data.target_mean.dtype == data.target_std.dtype == torch.float32
    assert data.target_mean.numpy() == pytest.approx(targets.mean(0), rel=1e-6)
    assert data.target_std.numpy() == pytest.approx(targets.std(0, ddof=1), rel=1e-6)


def test_targets_come_in_the_order_that_was_asked_for(make):
    names = ("gap", "mu", "A")
    data = make(targets=names)
    batch = next(iter(data.test_dataloader()))
    rows = np.random.default_rng(0).permutation(NUM)[:8]
    columns = [list(TARGETS).index(name) for name in names]
    assert np.array_equal(batch["targets"], load_cache(data.cache_dir).targets[rows][:, columns])


def test_processes_share_the_molecules(make):
    shares = []
    for rank in range(3):
        data = make(batch_size=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        shares.append(splits(data))
    for split, size in (("train", 36), ("val", 9), ("test", 13)):
        served = list(chain.from_iterable(share[split] for share in shares))
        assert len(served) == len(set(served)) == size


class Recorder(L.LightningModule):
    """Remembers the molecules it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["targets"][:, 0].tolist())
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(make, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Recorder()
    make_trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True).fit(whole, make())
    assert len(whole.seen) == 8
    assert whole.seen[:4] != whole.seen[4:]
    resumed = Recorder()
    make_trainer(max_epochs=2).fit(resumed, make(), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert resumed.seen == whole.seen[2:]


def test_every_pass_of_a_process_is_the_same_until_the_epoch_changes(make):
    loader = make().train_dataloader()
    assert len(loader) == 4
    first = dipoles(islice(loader, 2))
    assert dipoles(loader)[:16] == first
    loader.sampler.set_epoch(1)
    assert dipoles(loader)[:16] != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_val": 0}, "num_val=0 must be at least 1"),
        ({"num_test": 0}, "num_test=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"shuffle_seed": -1}, "shuffle_seed=-1 must be at least 0"),
        ({"targets": ()}, r"targets=\[\] must name"),
        ({"targets": ("mu", "dipole")}, "must name one or more of"),
        ({"num_molecules": 29}, "num_test=13 and num_val=9 leave 7 of 29 molecules for training"),
        ({"num_molecules": 23, "batch_size": 1}, "leave 1 of 23 molecules"),
        ({"num_molecules": -5}, "leave -27 of -5"),
    ],
)
def test_bad_arguments_before_anything_is_read(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        QM9DataModule(cache_dir=tmp_path, **{"batch_size": 8, **SIZES, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_molecules": 61}, "num_molecules=61 is more than the 60 that there are"),
        ({"num_test": 50}, "num_test=50 and num_val=9 leave 1 of 60"),
        ({"batch_size": 39}, "leave 38 of 60 .* batch_size=39"),
    ],
)
def test_sizes_that_the_molecules_cannot_give(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_a_constant_target_is_refused(tmp_path, monkeypatch):
    rows = [row | {"LUMO_au": "0.1"} for row in many_rows(30)]
    install(monkeypatch, tmp_path / "site", rows)
    arguments = {"cache_dir": tmp_path, "batch_size": 8, "num_val": 5, "num_test": 5}
    data = QM9DataModule(targets=("mu", "lumo"), **arguments)
    data.prepare_data()
    with pytest.raises(ValueError, match="The target 'lumo' is the same for all 20 training molecules"):
        data.setup("fit")
    QM9DataModule(targets=("mu", "homo"), **arguments).setup("fit")
