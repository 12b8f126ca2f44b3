"""The files of the package qm9pack: found, verified, and read row by row.

The package is not imported, because that needs `pkg_resources`, which current versions of setuptools no longer have.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from recipes.qm9.molecules import ELEMENTS
from recipes.qm9.targets import TARGETS

__all__ = ["CHECKSUMS", "INSTALL", "PROPERTIES", "Row", "find_files", "read_rows", "verify_files"]

INSTALL = 'pip install "qm9pack==1.0.3" "rdkit>=2026.9"'
# SHA-256 of the files of qm9pack 1.0.3, in the order of the molecules.
CHECKSUMS: dict[str, str] = {
    "qm9_part1.csv": "19f0a5d595462d52cd82eef3370f3e9eb55a1f52cb14985657200349568deff3",
    "qm9_part2.csv": "2bca113fdc0b28a13563c80ed9b240e934f3da6c64c64fe74ddb4f0f36036e61",
    "qm9_part3.csv": "9c5efb5733d2af149db8d95d36ff198b4ffed12d9f7b344220a1e5877d5c6a43",
}
# Columns of the properties, each once. In their names, au is hartree.
PROPERTIES = tuple(dict.fromkeys(target.column for target in TARGETS.values()))
_COLUMNS = ("Index", "SMILES", "N_atoms", "Elements", "XYZ_Ang", *PROPERTIES)
_CODES = {element: code for code, element in enumerate(ELEMENTS)}
_NO_BRACKETS = str.maketrans("", "", "[]")


class Row(NamedTuple):
    """One molecule.

    Attributes:
        index: Number in QM9.
        smiles: SMILES, without most of the hydrogens.
        elements: From 0 to 4 for H, C, N, O and F, one per atom.
        positions: x, y and z of one atom after another, in angstrom.
        properties: The values of `PROPERTIES`.
    """

    index: int
    smiles: str
    elements: list[int]
    positions: list[float]
    properties: list[float]


def find_files() -> list[Path]:
    """Find the files of the installed package.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        FileNotFoundError: If one of its files is missing.
    """
    spec = find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The data of QM9 are in the package qm9pack, which is not installed: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    paths = [folder / name for name in CHECKSUMS]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. Install qm9pack again: {INSTALL} --force-reinstall --no-deps")
    return paths


def verify_files(paths: list[Path]) -> int:
    """Compare the files with `CHECKSUMS`, and return the number of their rows.

    Raises:
        ValueError: If a file belongs to another version of the package.
    """
    rows = 0
    for path in paths:
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != CHECKSUMS[path.name]:
            raise ValueError(
                f"{path} is not the file of qm9pack 1.0.3: its SHA-256 is {found} instead of {CHECKSUMS[path.name]}."
                f" Install that version again: {INSTALL} --force-reinstall --no-deps"
            )
        rows += content.count(b"\n") - 1
    return rows


def read_rows(path: Path) -> Iterator[Row]:
    """Read the molecules of one file.

    Raises:
        ValueError: If a column is missing, or a row has an unknown element, a value that is not a finite number, or
            contradictory numbers of atoms. The message names the file and the molecule.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if missing := [name for name in _COLUMNS if name not in header]:
            raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {header}.")
        columns = [header.index(name) for name in _COLUMNS]
        for line in lines:
            if len(line) != len(header):
                raise ValueError(f"{path}, line {lines.line_num}: {len(line)} cells instead of {len(header)}.")
            try:
                yield _parse(*(line[column] for column in columns))
            except ValueError as error:
                raise ValueError(f"{path}, line {lines.line_num}, Index {line[columns[0]]}: {error}") from None


def _parse(index: str, smiles: str, num_atoms: str, elements: str, positions: str, *properties: str) -> Row:
    symbols = elements.removeprefix("['").removesuffix("']").split("','")
    if unknown := [symbol for symbol in symbols if symbol not in _CODES]:
        raise ValueError(f"Elements has {unknown[0]!r}, which is not one of {ELEMENTS}.")
    coordinates = [_finite("XYZ_Ang", text) for text in positions.translate(_NO_BRACKETS).split(",")]
    if not int(num_atoms) == len(symbols) == len(coordinates) / 3:
        raise ValueError(
            f"the numbers of atoms disagree: N_atoms is {num_atoms}, Elements has {len(symbols)} and XYZ_Ang"
            f" {len(coordinates)} coordinates."
        )
    values = [_finite(name, text) for name, text in zip(PROPERTIES, properties, strict=True)]
    return Row(int(index), smiles, [_CODES[symbol] for symbol in symbols], coordinates, values)


def _finite(column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} has {text!r}, which is not a finite number.")
    return value
