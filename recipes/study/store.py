"""Finished runs on disk, with their settings and versions."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_cost import TeleportReport
from recipes.common.compare import Variant
from recipes.common.files import replacing
from recipes.common.training import Evaluation, Look, Measured
from recipes.study.spec import RunSpec

__all__ = ["Record", "Store", "StoredRunError", "versions"]

_SOURCES = Path(__file__).parents[2]
_PACKAGES = ("lightning-cost", "lightning", "torch", "torchjd", "peft", "torchmetrics", "numpy")


class StoredRunError(ValueError):
    """A stored run has other settings than the requested one, or cannot be read."""


@dataclass(frozen=True)
class Record:
    """A finished run: its settings as text, versions of Python and of the packages, and what was measured."""

    spec: RunSpec
    settings: dict[str, str]
    versions: dict[str, str]
    measured: Measured


@dataclass(frozen=True)
class Store:
    """Keeps each finished run in two files of a folder: `<name>.json`, and its teleports in `<name>.reports.jsonl.gz`.

    The JSON file is written last, in one piece. So it exists if and only if the run is finished.
    """

    folder: Path

    def has(self, spec: RunSpec, settings: Mapping[str, str]) -> bool:
        """Whether a run is finished.

        Raises:
            StoredRunError: If a run of that name has other settings.
        """
        path, _ = self._paths(spec)
        if not path.exists():
            return False
        stored = self._read(path).get("settings", {})
        different = {name: (stored.get(name), new) for name, new in settings.items() if stored.get(name) != new}
        if different:
            raise StoredRunError(
                f"{path} was run with other settings (stored, now): {different}. Delete it to run it again, or choose"
                " another `--output`."
            )
        return True

    def save(self, record: Record) -> None:
        """Store a finished run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, reports_path = self._paths(record.spec)
        content = asdict(record)
        reports = content["measured"].pop("reports")
        with replacing(reports_path) as temporary, gzip.open(temporary, "wt") as file:
            file.writelines(json.dumps(report) + "\n" for report in reports)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load(self, spec: RunSpec) -> Record:
        """Read a finished run.

        Raises:
            StoredRunError: If the run is not finished, or its files cannot be read.
        """
        path, reports_path = self._paths(spec)
        if not path.exists():
            raise StoredRunError(f"The run {spec.name} is not finished: there is no {path}.")
        content = self._read(path)
        try:
            with gzip.open(reports_path, "rt") as file:
                reports = [TeleportReport(**json.loads(line)) for line in file]
        except (OSError, EOFError, TypeError, ValueError) as error:
            raise StoredRunError(f"{reports_path} cannot be read: {error}. Delete it and {path.name}.") from error
        try:
            measured = content["measured"]
            for curve in ("validation", "test_curve"):
                measured[curve] = [Evaluation(**evaluation) for evaluation in measured[curve]]
            measured["looks"] = [Look(**look) for look in measured["looks"]]
            stored = RunSpec(**{**content["spec"], "variant": Variant(**content["spec"]["variant"])})
            record = Record(stored, content["settings"], content["versions"], Measured(**measured, reports=reports))
        except (KeyError, TypeError) as error:
            raise StoredRunError(f"{path} is of another version: {error!r}. Delete it to run it again.") from error
        if stored != spec:
            raise StoredRunError(f"{path} holds another run, {stored}, instead of {spec}. Choose other names.")
        return record

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoredRunError(f"{path} cannot be read: {error}. Delete it to run it again.") from error
        return content

    def _paths(self, spec: RunSpec) -> tuple[Path, Path]:
        return self.folder / f"{spec.name}.json", self.folder / f"{spec.name}.reports.jsonl.gz"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence the results, and a checksum of the sources here."""
    digest = hashlib.sha256()
    for folder in ("lightning_cost", "recipes"):
        for path in sorted((_SOURCES / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    packages = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | packages | {"sources": digest.hexdigest()[:12]}
