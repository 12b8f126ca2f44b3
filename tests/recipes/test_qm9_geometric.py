"""The same molecules processed by torch_geometric, which is given them in the files that it would download."""

import sys

import numpy as np
import pytest
import torch

from recipes.qm9.assemble import assemble
from recipes.qm9.data import QM9DataModule
from recipes.qm9.geometric import load_processed
from recipes.qm9.molecules import ELEMENTS, MoleculeTensors
from recipes.qm9.network import node_features
from recipes.qm9.source import read_rows
from recipes.qm9.targets import TARGETS
from tests.support.qm9_package import real_rows, write_rows

pytest.importorskip("torch_geometric")

# A place that torch_geometric leaves out, as it does where the structure of a molecule is uncertain.
UNCHARACTERIZED = 5
# kcal/mol in a hartree, and the energies of the atoms: the file atomref.txt of QM9.
KCAL_MOL = 627.5094738
ATOMS = {
    "InternalEnergy_0K_au": {"H": -0.500273, "C": -37.846772, "N": -54.583861, "O": -75.064579, "F": -99.718730},
    "InternalEnergy_298K_au": {"H": -0.498857, "C": -37.845355, "N": -54.582445, "O": -75.063163, "F": -99.717314},
    "Enthalphy_298K_au": {"H": -0.497912, "C": -37.844411, "N": -54.581501, "O": -75.062219, "F": -99.716370},
    "GibbsFreeEnergy_298K_au": {"H": -0.510927, "C": -37.861317, "N": -54.598897, "O": -75.079532, "F": -99.733544},
}
COLUMNS = {
    "A": "RotA_GHz",
    "B": "RotB_GHz",
    "C": "RotC_GHz",
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "gap": "HOMO_LUMO_gap_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u298": "InternalEnergy_298K_au",
    "h298": "Enthalphy_298K_au",
    "g298": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}


def write_raw(raw, molecules, rows):
    """The three files that torch_geometric's QM9 reads, with positions of four decimals as in DeepChem's."""
    raw.mkdir(parents=True)
    header = ["mol_id", *COLUMNS, *(f"{name}_atom" for name in ("u0", "u298", "h298", "g298"))]
    table, blocks = [",".join(header)], []
    places = {number: place for place, number in enumerate(molecules.index.tolist())}
    atoms = np.split(np.arange(len(molecules.elements)), np.cumsum(molecules.num_atoms, dtype=int))
    bonds = np.split(np.arange(len(molecules.bond_orders)), np.cumsum(molecules.num_bonds, dtype=int))
    for number in range(1, max(places) + 1):
        if number not in places:
            table.append(f"gdb_{number}" + ",0" * 19)
            blocks.append(f"gdb_{number}\n\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n$$$$\n")
            continue
        place = places[number]
        symbols = [ELEMENTS[element] for element in molecules.elements[atoms[place]]]
        values = [float(rows[place][column]) for column in COLUMNS.values()]
        values += [(float(rows[place][name]) - sum(map(of.get, symbols))) * KCAL_MOL for name, of in ATOMS.items()]
        table.append(",".join([f"gdb_{number}", *map(repr, values)]))
        lines = [f"gdb_{number}", "", "", f"{len(symbols):3d}{len(bonds[place]):3d}  0  0  0  0  0  0  0  0999 V2000"]
        for symbol, position in zip(symbols, molecules.positions[atoms[place]].tolist(), strict=True):
            lines.append("{:10.4f}{:10.4f}{:10.4f}".format(*position) + f" {symbol:<3} 0  0")
        for bond in bonds[place]:
            first, second = molecules.bond_atoms[bond] + 1
            lines.append(f"{first:3d}{second:3d}{molecules.bond_orders[bond]:3d}  0")
        blocks.append("\n".join([*lines, "M  END", "$$$$", ""]))
    (raw / "gdb9.sdf").write_text("".join(blocks))
    (raw / "gdb9.sdf.csv").write_text("\n".join([*table, ""]))
    absent = "".join(f"{number} placeholder\n" for number in range(1, max(places)) if number not in places)
    (raw / "uncharacterized.txt").write_text("\n" * 9 + absent + "\n")


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """Molecules assembled by this recipe, the folder of torch_geometric, and what it made of them."""
    from torch_geometric.datasets import QM9

    folder = tmp_path_factory.mktemp("geometric")
    # Real molecules under low numbers, so that no more than one place is empty; the last two have theirs for a reason.
    rows = [row | {"Index": str(i + 1)} for i, row in enumerate(real_rows()[:-2])]
    del rows[UNCHARACTERIZED - 1]
    molecules = assemble(read_rows(write_rows(folder / "rows.csv", rows)))
    write_raw(folder / "root" / "raw", molecules, rows)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(QM9, "download", None)
        return molecules, folder / "root", QM9(str(folder / "root"))


def test_its_graphs_are_those_of_the_batches(processed):
    molecules, _, dataset = processed
    batch = MoleculeTensors(molecules, list(range(len(TARGETS)))).batch(torch.arange(len(molecules)))
    features = node_features(batch["elements"], batch["bonds"], batch["mask"])
    assert len(dataset) == len(molecules) == 15
    for row, data in enumerate(dataset):
        num = data.num_nodes
        assert data.idx + 1 == molecules.index[row]
        assert torch.equal(features[row, :num], data.x)
        assert not features[row, num:].any()
        ends = batch["bonds"][row].nonzero().T
        assert torch.equal(ends, data.edge_index)
        assert torch.equal(batch["bonds"][row][tuple(ends)].long() - 1, data.edge_attr.argmax(1))
        torch.testing.assert_close(batch["positions"][row, :num], data.pos, rtol=0, atol=5.1e-5)
        assert torch.equal(batch["targets"][row], data.y[0])


def test_its_folder_gives_the_same_molecules(processed):
    molecules, root, _ = processed
    for name, array in load_processed(root).arrays().items():
        expected = molecules.arrays()[name]
        assert array.dtype == expected.dtype
        assert (
            np.allclose(array, expected, rtol=0, atol=5.1e-5)
            if name == "positions"
            else np.array_equal(array, expected)
        ), name


def test_the_data_module_reads_its_folder(processed, tmp_path):
    molecules, root, _ = processed
    data = QM9DataModule(root, ("mu", "gap"), batch_size=4, num_val=3, num_test=5, cache_dir=tmp_path)
    data.prepare_data()
    assert not list(tmp_path.iterdir())
    data.setup("fit")
    (batch,) = list(data.test_dataloader())[:1]
    rows = np.random.default_rng(0).permutation(15)[:4]
    assert np.array_equal(batch["targets"], molecules.targets[rows][:, [0, 4]])
    assert batch["mask"].sum(1).tolist() == molecules.num_atoms[rows].tolist()


def altered(root, tmp_path, alter):
    """The folder with something changed in its file."""
    path = tmp_path / "processed" / "data_v3.pt"
    path.parent.mkdir()
    data, *rest = torch.load(root / "processed" / "data_v3.pt", weights_only=False)
    alter(data)
    torch.save((data, *rest), path)
    return tmp_path


def test_aromatic_bonds_keep_their_type(processed, tmp_path):
    molecules, root, _ = processed

    def alter(data):
        double = data["edge_attr"][:, 1].bool()
        data["edge_attr"][double] = torch.tensor([0.0, 0.0, 0.0, 1.0])

    orders = load_processed(altered(root, tmp_path, alter)).bond_orders
    assert np.array_equal(orders, np.where(molecules.bond_orders == 2, 4, molecules.bond_orders))


def perceive(data):
    data["x"][0, 7] = 1


def add_distances(data):
    data["edge_attr"] = torch.cat([data["edge_attr"], torch.ones(len(data["edge_attr"]), 1)], 1)


def drop_direction(data):
    data["edge_index"][:, 0] = data["edge_index"][:, 0].flip(0)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (perceive, "features of atoms are not those that their elements and bonds give"),
        (add_distances, "without pre_transform: atoms have 11 and edges 5 features"),
        (drop_direction, "not every bond has two directions"),
        (lambda data: data.pop("idx"), "data_v3.pt is not as torch_geometric"),
        (lambda data: data.update(y=data["y"][:, :12]), "'targets' has shape"),
    ],
)
def test_another_file_is_refused(processed, tmp_path, alter, message):
    with pytest.raises(ValueError, match=message):
        load_processed(altered(processed[1], tmp_path, alter))


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "processed" / "data_v3.pt"
    path.parent.mkdir()
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"data_v3\.pt is not as torch_geometric"):
        load_processed(tmp_path)


def test_nothing_is_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no processed/data_v3\.pt\. Let torch_geometric"):
        load_processed(tmp_path)
    assert not list(tmp_path.iterdir())


def test_torch_geometric_is_asked_for_where_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch_geometric"):
        load_processed(tmp_path)
