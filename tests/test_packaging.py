"""What the project says of itself in its files holds: extras, versions, links, and what it runs without."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Of the packages that only an extra brings, those whose distribution has another name than the module.
DISTRIBUTIONS = {"sklearn": "scikit_learn", "PIL": "pillow"}


def imported_by_the_library() -> set[str]:
    """The outermost package of every import, also of those within functions."""
    found = set()
    for path in (ROOT / "lightning_cost").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"lightning_cost"}


def required(requirements: list[str]) -> set[str]:
    """The names of the modules of some requirements."""
    names = {re.split(r"[\s\[<>=!~;]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    modules = {distribution: module for module, distribution in DISTRIBUTIONS.items()}
    return {modules.get(name, name) for name in names}


def test_every_dependency_is_imported_and_every_import_is_a_dependency() -> None:
    # lightning brings lightning_utilities along, and their versions belong together.
    imported = imported_by_the_library() - {"lightning_utilities"}
    extra = required(PROJECT["project"]["optional-dependencies"]["plots"])
    assert imported == required(PROJECT["project"]["dependencies"]) | extra


@pytest.fixture(scope="module")
def python_without(tmp_path_factory: pytest.TempPathFactory):
    """Runs a program where some packages are not installed: neither their modules nor what pip knows of them."""
    packages = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}

    def run(missing: tuple[str, ...], program: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("packages")
        absent = {*missing, *(DISTRIBUTIONS.get(name, name) for name in missing)}
        for entry in (entry for path in packages for entry in path.iterdir()):
            if re.split(r"[-.]", entry.name)[0] not in absent and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
        # -S leaves the folder out where everything is installed.
        command = [sys.executable, "-S", "-c", program]
        return subprocess.run(
            command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


TRAIN = """
import importlib.util
import lightning as L, torch
from torch import nn
from torchjd.aggregation import UPGrad
from lightning_cost import ConflictMonitor, MultiTaskMixin, SymmetryTeleportCallback

missing = [name for name in ("matplotlib", "torchvision", "sklearn", "PIL") if importlib.util.find_spec(name) is None]

class Model(MultiTaskMixin, L.LightningModule):
    shared_module = "backbone"

    def __init__(self):
        super().__init__()
        self.mtl_method = UPGrad()
        self.backbone = nn.Linear(4, 3)

    def task_losses(self, batch, batch_idx):
        x, y = self.backbone(batch).square().mean(dim=0)[:2]
        return {"x": x, "y": (y - 3).square()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

torch.manual_seed(0)
cost = SymmetryTeleportCallback(start_epoch=0, trigger=lambda gradients: True)
settings = dict(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
data = torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8)
L.Trainer(**settings, callbacks=[cost, ConflictMonitor()]).fit(Model(), data)
print("MISSING", *missing)
print("TELEPORTS", len(cost.reports))
import lightning_cost.metrics
try:
    import lightning_cost.plots
except ImportError as error:
    print("PLOTS", error)
"""


def test_the_library_trains_without_its_extras(python_without) -> None:
    result = python_without(("matplotlib", "torchvision", "sklearn", "PIL"), TRAIN)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "MISSING matplotlib torchvision sklearn PIL" in lines
    assert "TELEPORTS 4" in lines
    (plots,) = (line for line in lines if line.startswith("PLOTS"))
    assert 'pip install "lightning-cost[plots]"' in plots
