"""Molecules of qm9pack: rows, bonds and targets, and what is wrong with rows that are refused."""

import sys
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest

from recipes.qm9.assemble import assemble
from recipes.qm9.bonds import UnmatchedGraphError, find_bonds
from recipes.qm9.molecules import ELEMENTS, Molecules
from recipes.qm9.source import CHECKSUMS, find_files, read_rows, verify_files
from recipes.qm9.targets import BENCHMARK, TARGETS, chosen_targets
from tests.support.qm9_package import ROWS, install, real_rows, row_of, write_rows

BENZENE, ZWITTERION, NITRO = 214, 271, 21977
STRETCHED = (133857, 133859)


def molecules_of(path, *rows) -> Molecules:
    return assemble(read_rows(write_rows(path / "rows.csv", rows)))


def parsed(index):
    return next(row for row in read_rows(ROWS) if row.index == index)


def bonds_of(row, order=None):
    """Bonds of a molecule whose atoms were put into another order, as pairs of the old one."""
    order = np.arange(len(row.elements)) if order is None else order
    positions = np.array(row.positions).reshape(-1, 3)
    pairs, orders = find_bonds(row.smiles, [row.elements[i] for i in order], positions[order])
    assert pairs.tolist() == sorted(pairs.tolist())
    assert (pairs[:, 0] < pairs[:, 1]).all()
    return {frozenset(pair): int(bond) for pair, bond in zip(order[pairs].tolist(), orders, strict=True)}


def test_methane(tmp_path):
    methane = molecules_of(tmp_path, row_of(1))
    expected = [0, 13.21, -10.5499, 3.1865, 13.7363, 35.3641, 1.2177]
    assert methane.targets[0, :7] == pytest.approx(expected, abs=5e-5)
    # Published atomisation energies of methane in kcal/mol: -395.999595, -398.64329, -401.014647, -372.471772.
    published = np.array([-395.999595, -398.64329, -401.014647, -372.471772])
    assert methane.targets[0, 12:16] == pytest.approx(published * 0.04336414, rel=1e-6)
    assert methane.targets[0, 16:] == pytest.approx([157.7118, 157.70997, 157.70699])
    assert methane.index.tolist() == [1]
    assert [ELEMENTS[element] for element in methane.elements] == ["C", "H", "H", "H", "H"]
    assert methane.positions[1] == pytest.approx([0.002150416, -0.0060313176, 0.0019761204])
    assert methane.bond_atoms.tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert methane.bond_orders.tolist() == [1, 1, 1, 1]


def test_arrays_are_those_of_the_molecules_one_after_another(tmp_path):
    whole = assemble(read_rows(ROWS))
    alone = [molecules_of(tmp_path, row) for row in real_rows()]
    for name, array in whole.arrays().items():
        assert np.array_equal(array, np.concatenate([molecule.arrays()[name] for molecule in alone])), name


def test_acetylene_is_matched_where_its_smiles_starts_at_the_other_end():
    # The third atom is on the left, beside the second one.
    assert bonds_of(parsed(4)) == {frozenset((0, 1)): 3, frozenset((0, 3)): 1, frozenset((1, 2)): 1}


def test_the_kekule_structure_is_the_one_that_the_smiles_spells():
    bonds = bonds_of(parsed(BENZENE))
    assert [bonds[frozenset((atom, (atom + 1) % 6))] for atom in range(6)] == [2, 1, 2, 1, 2, 1]


def test_five_valent_nitrogen_is_charged():
    row = parsed(NITRO)
    assert row.smiles.startswith("O=N(=O)")
    bonds = bonds_of(row)
    assert sorted((bonds[frozenset((0, 1))], bonds[frozenset((1, 2))])) == [1, 2]


def test_of_two_matches_the_one_with_shorter_double_bonds_counts():
    row = parsed(ZWITTERION)
    positions = np.array(row.positions).reshape(-1, 3)
    oxygens = [
        (np.linalg.norm(np.subtract(*positions[list(pair)])), order)
        for pair, order in bonds_of(row).items()
        if {ELEMENTS[row.elements[atom]] for atom in pair} == {"C", "O"}
    ]
    assert [order for _, order in sorted(oxygens)] == [2, 1]


# Benzene has two Kekulé structures.
@pytest.mark.parametrize("index", [int(row["Index"]) for row in real_rows()[:-2] if int(row["Index"]) != BENZENE])
def test_the_order_of_the_atoms_does_not_matter(index):
    row = parsed(index)
    order = np.random.default_rng(index).permutation(len(row.elements))
    assert bonds_of(row, order) == bonds_of(row)


@pytest.mark.parametrize("index", STRETCHED)
def test_two_molecules_are_allowed_long_bonds_by_their_index(tmp_path, index):
    row = row_of(index)
    assert len(molecules_of(tmp_path, row)) == 1
    with pytest.raises(UnmatchedGraphError, match=r"Molecule with Index 5: its SMILES 'C"):
        molecules_of(tmp_path, row | {"Index": "5"})


@pytest.mark.parametrize(
    ("smiles", "scale", "message"),
    [
        ("C(", 1, "is not a SMILES"),
        ("C(C)(C)(C)(C)C", 1, "is not a molecule"),
        ("S", 1, "has an element other than H, C, N, O and F"),
        ("CO", 1, "has other atoms than the coordinates"),
        # Formaldehyde and its isomer with the hydrogen at the oxygen.
        ("[CH]O", 1, "is not the graph of the coordinates"),
        ("C=O", 1.5, "far apart"),
        # Mentioned hydrogens come where they are mentioned: the graph is the same, in another order.
        ("[H]C([H])=O", 1, None),
    ],
)
def test_graphs_of_formaldehyde(tmp_path, smiles, scale, message):
    row = parsed(6)
    positions = scale * np.array(row.positions).reshape(-1, 3)
    if message is None:
        assert find_bonds(smiles, row.elements, positions)[1].tolist() == [2, 1, 1]
    else:
        with pytest.raises(UnmatchedGraphError, match=message):
            find_bonds(smiles, row.elements, positions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"N_atoms": "6"}, "N_atoms is 6, Elements has 5 and XYZ_Ang 15 coordinates"),
        ({"Elements": "['C','H','H','H']"}, "N_atoms is 5, Elements has 4 and XYZ_Ang 15"),
        ({"XYZ_Ang": "[[0.,0.,0.],[1.,0.]]"}, "Elements has 5 and XYZ_Ang 5 coordinates"),
        ({"Elements": "['C','H','H','H','X']"}, "Elements has 'X', which is not one of"),
        ({"Elements": "[]"}, r"Elements has '\[\]'"),
        ({"XYZ_Ang": "[[0.,0.,inf],[1.,0.,0.]]"}, "XYZ_Ang has 'inf', which is not a finite number"),
        ({"LUMO_au": "nan"}, "LUMO_au has 'nan', which is not"),
        ({"ZPVE_au": ""}, "ZPVE_au has '', which is not"),
        ({"R2_bohr2": "1e999"}, "R2_bohr2 has '1e999'"),
        ({"N_atoms": "five"}, "'five'"),
        ({"SMILES": "CC"}, r"Molecule with Index 1: its SMILES 'CC' has other atoms than the coordinates\."),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        molecules_of(tmp_path, row_of(1) | changes)
    assert "Index 1" in str(raised.value)
    if "SMILES" not in changes:
        assert f"{tmp_path / 'rows.csv'}, line 2" in str(raised.value)


def test_a_missing_column_is_named(tmp_path):
    row = row_of(1)
    del row["HOMO_au"]
    with pytest.raises(ValueError, match=r"rows\.csv has no column 'HOMO_au'"):
        molecules_of(tmp_path, row)


def test_a_torn_line_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.csv", real_rows()[:2])
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=r"rows\.csv, line 3: \d+ cells instead of 25"):
        list(read_rows(path))


def test_indices_increase(tmp_path):
    with pytest.raises(ValueError, match="do not increase"):
        molecules_of(tmp_path, row_of(2), row_of(1))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("targets", np.zeros((18, 18), np.float32), r"'targets' has shape \(18, 18\)"),
        ("positions", np.zeros((3, 3), np.float32), "'positions' has shape"),
        ("index", np.arange(18), "'index' has shape .* and type int64"),
        ("elements", 5, "'elements' has values outside 0 to 4"),
        ("bond_orders", 0, "'bond_orders' has values outside 1 to 4"),
        ("bond_atoms", 2, "A bond joins atoms that its molecule does not have"),
        ("bond_atoms", [[0, 9]], "A bond joins atoms that its molecule does not have"),
        ("targets", np.nan, "'targets' has values that are not finite"),
    ],
)
def test_arrays_that_do_not_fit_together(name, array, message):
    arrays = assemble(read_rows(ROWS)).arrays()
    if not isinstance(array, np.ndarray):
        array = np.concatenate([np.broadcast_to(array, arrays[name][:1].shape), arrays[name][1:]])
        array = array.astype(arrays[name].dtype)
    with pytest.raises(ValueError, match=message):
        Molecules(**arrays | {name: array})


def test_files_are_found_without_importing_and_verified(tmp_path, monkeypatch):
    data = install(monkeypatch, tmp_path, real_rows())
    files = find_files()
    assert files == [data / name for name in CHECKSUMS]
    assert verify_files(files) == len(real_rows())
    assert "qm9pack" not in sys.modules
    with files[1].open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"qm9_part2.csv is not the file of qm9pack 1\.0\.3.*pip install"):
        verify_files(files)
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"qm9_part3\.csv is missing.*pip install"):
        find_files()


def test_the_package_is_asked_for_where_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "qm9pack", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install .qm9pack==1\.0\.3"):
        find_files()


@pytest.mark.skipif(find_spec("qm9pack") is None, reason="needs qm9pack")
def test_the_real_package():
    files = find_files()
    assert verify_files(files) == 130_831
    for first, path in zip((1, 44747, 89009), files, strict=True):
        molecules = assemble(islice(read_rows(path), 20))
        assert molecules.index[0] == first
        # Each hydrogen has one bond, and no atom more than four.
        ends = molecules.bond_atoms + np.repeat(
            np.cumsum(molecules.num_atoms, dtype=int) - molecules.num_atoms, molecules.num_bonds
        ).reshape(-1, 1)
        valences = np.bincount(ends.ravel(), np.repeat(molecules.bond_orders, 2))
        assert set(valences[molecules.elements == 0]) == {1}
        assert valences.max() == 4


def test_the_benchmark_has_published_values():
    assert list(TARGETS).index("U0_atom") == 12
    columns = [list(TARGETS).index(name) for name in BENCHMARK]
    assert columns == [0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11]
    assert {name for name, target in TARGETS.items() if target.single_task_mae is not None} == set(BENCHMARK)
    # The positions that are reported in meV.
    assert [i for i, name in enumerate(BENCHMARK) if TARGETS[name].report_unit == "meV"] == [2, 3, 5, 6, 7, 8, 9]
    assert all(target.report_factor == (1000 if target.unit == "eV" else 1) for target in TARGETS.values())


@pytest.mark.parametrize("names", [(), ("mu", "dipole"), ("mu", "mu")])
def test_unknown_targets(names):
    with pytest.raises(ValueError, match="must name one or more of"):
        chosen_targets(names)
    assert list(chosen_targets(("gap", "mu"))) == ["gap", "mu"]
