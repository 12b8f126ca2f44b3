"""Imports run downwards, files stay short, and tests mirror the files that they test."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_cost

PACKAGE = Path(lightning_cost.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
HERE = Path(__file__).parent
TESTS = [path for path in sorted(HERE.rglob("*.py")) if "recipes" not in path.parts]
# From the top down. A module imports from lower layers, or from its own.
LAYERS = [
    {"lightning_cost"},
    {"lightning_cost.callback", "lightning_cost.plots"},
    {"lightning_cost.monitor"},
    {"lightning_cost.mixin"},
    {"lightning_cost._teleport"},
    {"lightning_cost.searches"},
    {"lightning_cost.objectives"},
    {"lightning_cost._derivatives"},
    {"lightning_cost.surface", "lightning_cost.invariance", "lightning_cost.triggers"},
    {"lightning_cost._training", "lightning_cost.methods", "lightning_cost.metrics"},
    {"lightning_cost.gradients"},
    {
        "lightning_cost._lightning",
        "lightning_cost._vectors",
        "lightning_cost._min_norm",
        "lightning_cost._arguments",
    },
]


def imported(path: Path) -> set[str]:
    """Every module of the project that a file imports, for types as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("lightning_cost", "recipes", "benchmarks", "tests")}


def layer(module: str) -> int:
    """The layer of the longest prefix of a module's name that is listed."""
    matches = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or (name != "lightning_cost" and module.startswith(f"{name}."))
    ]
    return max(matches)[1]


def test_no_imports_in_a_circle() -> None:
    order = list(TopologicalSorter({name: imported(path) for name, path in SOURCES.items()}).static_order())
    assert len(order) >= 40
    assert order[-1] == "lightning_cost"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_run_downwards(module: str) -> None:
    for name in imported(SOURCES[module]):
        assert name in SOURCES, f"{module} imports {name}"
        assert layer(name) >= layer(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_file_is_long(module: str) -> None:
    assert len(SOURCES[module].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(HERE)))
def test_no_test_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", [module for module in sorted(SOURCES) if SOURCES[module].name != "__init__.py"])
def test_every_file_has_a_test_file_at_the_same_place(module: str) -> None:
    path = SOURCES[module].relative_to(PACKAGE)
    assert (HERE / path.parent / f"test_{path.stem.removeprefix('_')}.py").exists()


def test_public_names_are_there() -> None:
    assert all(hasattr(lightning_cost, name) for name in lightning_cost.__all__)
    assert len(set(lightning_cost.__all__)) == len(lightning_cost.__all__)
