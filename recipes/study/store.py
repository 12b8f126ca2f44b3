"""Finished runs on disk: what was measured, under which settings and versions."""

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
    """A stored run is not the one that was asked for, or cannot be read."""


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        spec: Which run it was.
        settings: The problem, the method and the callback, spelled out.
        versions: Versions of Python and of the packages.
        measured: What came out.
    """

    spec: RunSpec
    settings: dict[str, str]
    versions: dict[str, str]
    measured: Measured


class Store:
    """Keeps each finished run in two files: `<name>.json`, and its teleports in `<name>.reports.jsonl.gz`.

    The first is written last and in one piece, so that it is there if and only if the run is finished.

    Args:
        folder: Where they are; made when the first run is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, spec: RunSpec, settings: Mapping[str, str]) -> bool:
        """Whether a run is finished.

        Raises:
            StoredRunError: If there is one of that name with other settings.
        """
        path = self._path(spec)
        if not path.exists():
            return False
        stored = self._read(path).get("settings", {})
        if stored != dict(settings):
            different = {name: (stored.get(name), settings.get(name)) for name in settings}
            different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
            raise StoredRunError(
                f"{path} was run with other settings (stored, now): {different}. Delete it to run it again, or choose"
                " another `--output`."
            )
        return True

    def save(self, record: Record) -> None:
        """Store a finished run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(record.spec)
        measured = asdict(record.measured)
        reports = measured.pop("reports")
        with replacing(self._reports_path(record.spec)) as temporary, gzip.open(temporary, "wt") as file:
            file.writelines(json.dumps(report) + "\n" for report in reports)
        content = {
            "spec": asdict(record.spec),
            "settings": record.settings,
            "versions": record.versions,
            "measured": measured,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def load(self, spec: RunSpec) -> Record:
        """Read a finished run.

        Args:
            spec: Which one.

        Raises:
            StoredRunError: If there is none, or its files cannot be read.
        """
        path = self._path(spec)
        if not path.exists():
            raise StoredRunError(f"The run {spec.name} is not finished: there is no {path}.")
        content = self._read(path)
        try:
            record = self._record(content, self._read_reports(spec))
        except (KeyError, TypeError) as error:
            raise StoredRunError(f"{path} is of another version: {error!r}. Delete it to run it again.") from error
        if record.spec != spec:
            raise StoredRunError(f"{path} holds another run, {record.spec}, instead of {spec}. Choose other names.")
        return record

    def _record(self, content: dict[str, Any], reports: list[TeleportReport]) -> Record:
        measured = content["measured"]
        return Record(
            RunSpec(**{**content["spec"], "variant": Variant(**content["spec"]["variant"])}),
            content["settings"],
            content["versions"],
            Measured(
                **{
                    **measured,
                    "validation": [Evaluation(**evaluation) for evaluation in measured["validation"]],
                    "test_curve": [Evaluation(**evaluation) for evaluation in measured["test_curve"]],
                    "looks": [Look(**look) for look in measured["looks"]],
                    "reports": reports,
                }
            ),
        )

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoredRunError(f"{path} cannot be read: {error}. Delete it to run it again.") from error
        return content

    def _read_reports(self, spec: RunSpec) -> list[TeleportReport]:
        path = self._reports_path(spec)
        try:
            with gzip.open(path, "rt") as file:
                return [TeleportReport(**json.loads(line)) for line in file]
        except (OSError, EOFError, TypeError, ValueError) as error:
            raise StoredRunError(f"{path} cannot be read: {error}. Delete it and the .json beside it.") from error

    def _path(self, spec: RunSpec) -> Path:
        return self.folder / f"{spec.name}.json"

    def _reports_path(self, spec: RunSpec) -> Path:
        return self.folder / f"{spec.name}.reports.jsonl.gz"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run measures, and a checksum of the sources here."""
    digest = hashlib.sha256()
    for folder in ("lightning_cost", "recipes"):
        for path in sorted((_SOURCES / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    packages = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | packages | {"sources": digest.hexdigest()[:12]}
