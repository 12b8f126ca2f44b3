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
import yaml

import lightning_cost

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [*ROOT.glob("*.md"), *(page for name in ("docs", "recipes") for page in (ROOT / name).rglob("*.md"))]
LINK = re.compile(r"\[[^\]]+\]\((?!https?://|#)([^)#\s]+)(?:#[^)\s]*)?\)")
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


@pytest.mark.slow
def test_the_library_trains_without_its_extras(python_without) -> None:
    result = python_without(("matplotlib", "torchvision", "sklearn", "PIL"), TRAIN)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "MISSING matplotlib torchvision sklearn PIL" in lines
    assert "TELEPORTS 4" in lines
    (plots,) = (line for line in lines if line.startswith("PLOTS"))
    assert 'pip install "lightning-cost[plots]"' in plots


def test_the_extras_that_pages_and_messages_name_exist() -> None:
    extras = set(PROJECT["project"]["optional-dependencies"])
    texts = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *(ROOT / "lightning_cost").rglob("*.py"))}
    named = {
        (path, extra)
        for path, text in texts.items()
        for found in re.findall(r"""["'](?:\.|lightning-cost)\[([\w,]+)\]|extras? `(\w+)`""", text)
        for extra in ",".join(found).strip(",").split(",")
    }
    assert {extra for _, extra in named} >= {"plots", "recipes", "qm9"}
    assert {entry for entry in named if entry[1] not in extras} == set()
    readme = texts[ROOT / "README.md"]
    table = readme[readme.index("| Extra | For |") :].partition("\n\n")[0]
    assert {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])} == extras


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```|`[^`]*`\(", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [link for link in LINK.findall(prose) if not (page.parent / link).exists()] == []


def test_the_page_on_a_package_index_has_no_link_into_the_repository() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert LINK.search(readme)
    (substitution,) = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    shown = re.sub(substitution["pattern"], substitution["replacement"], readme)
    assert LINK.search(shown) is None
    code = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert code.findall(shown) == code.findall(readme)
    assert re.findall(r"\]\(https?://[^)]+\)", shown) == re.findall(r"\]\(https?://[^)]+\)", readme)


def test_every_place_that_cites_says_the_same() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PROJECT["project"]
    assert citation["version"] == lightning_cost.__version__
    assert citation["license"] == project["license"]
    assert citation["abstract"] == project["description"]
    assert citation["authors"] == project["authors"]
    (paper,) = citation["references"]
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert f"author    = {{{' and '.join(authors)}}}" in page
    assert f"title     = {{{paper['title']}}}" in page
    assert f"booktitle = {{{paper['collection-title']}}}" in page
    assert f"year      = {{{paper['year']}}}" in page
    assert paper["identifiers"][0]["value"] in page
    assert f"version = {{{lightning_cost.__version__}}}" in page


def test_the_workflow_runs_targets_of_the_makefile() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    runs = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    targets = {target for run in runs for target in re.findall(r"^make ([\w-]+)", run, re.MULTILINE)}
    assert targets == {"test", "lint", "docs"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    classifiers = [f"Programming Language :: Python :: {version}" for version in versions]
    assert [entry for entry in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", entry)] == classifiers


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_the_forms_of_issues_are_complete(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)


def private_names_of_others() -> set[str]:
    """The names with a leading underscore that the library uses, and does not have itself as well."""
    used, own = set(), set()
    for path in (ROOT / "lightning_cost").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute):
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                (own if of_self and isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                parts = [module, *(alias.name for alias in node.names)]
                used |= {name for part in parts if not module.startswith("lightning_cost") for name in part.split(".")}
    # A named tuple has these for everyone. `_loss` ends the name of a metric.
    return {name for name in used - own if re.fullmatch(r"_[A-Za-z]\w*", name)} - {"_fields", "_replace", "_loss"}


def test_the_page_on_stability_lists_what_others_keep_private() -> None:
    names = private_names_of_others()
    assert {"_w", "_phi_t", "_foreach_norm", "_model_averaging_period"} <= names
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b_[A-Za-z]\w*", page))
    assert names - named == set()
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "lightning_cost").rglob("*.py"))
    assert {name for name in named if not re.search(rf"\b{name}\b", text)} == set()
