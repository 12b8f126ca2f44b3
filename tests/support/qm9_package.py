"""A small package in the format of qm9pack, of molecules copied from it."""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

from recipes.qm9.source import CHECKSUMS

Row = dict[str, str]

ROWS = Path(__file__).with_name("qm9_rows.csv")


def real_rows() -> list[Row]:
    with ROWS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def row_of(index: int) -> Row:
    return next(row for row in real_rows() if row["Index"] == str(index))


def many_rows(num: int) -> list[Row]:
    """Copies of the molecules, told apart by their dipole, which is the number of the copy, from 1 on."""
    # Bonds as long as those of the last two are allowed under their own index only.
    sources = real_rows()[:-2]
    return [sources[i % len(sources)] | {"Index": str(i + 1), "Dipole_debye": str(i + 1)} for i in range(num)]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_package(folder: Path, rows: list[Row]) -> Path:
    """Write a package that cannot be imported, as the real one where setuptools is current."""
    data = folder / "qm9pack" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise ImportError('nobody may import it')\n")
    third = -(-len(rows) // len(CHECKSUMS))
    for part, name in enumerate(CHECKSUMS):
        write_rows(data / name, rows[part * third : (part + 1) * third])
    return data


def install(monkeypatch, folder: Path, rows: list[Row]) -> Path:
    """Put a small package before the real one, and make its files the ones that are expected."""
    data = write_package(folder, rows)
    monkeypatch.syspath_prepend(folder)
    for name in CHECKSUMS:
        monkeypatch.setitem(CHECKSUMS, name, hashlib.sha256((data / name).read_bytes()).hexdigest())
    return data
