"""The Python blocks of the README and of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The Python blocks, each with the output that is shown right below it."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def as_pattern(line: str) -> str:
    """What matches a line of output whatever its numbers are."""
    return rf"(?m)^{NUMBER.pattern.join(map(re.escape, NUMBER.split(line.rstrip())))}$"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_and_print_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page, one after the other in one namespace. Numbers may differ from those on the page."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for block, shown in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        for line in shown.splitlines():
            assert re.search(as_pattern(line), printed), f"{line!r} is not in:\n{printed}"


def test_the_first_examples_resolve_conflicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(ROOT / "README.md")[0][0], "README.md", "exec"), {"__name__": "page"})
    numbers = re.findall(r"(\d+) conflicts, (\d+) teleports, after (\d+) of them", capsys.readouterr().out)
    conflicts, accepted, resolved = map(int, numbers[0])
    assert conflicts >= accepted >= resolved > accepted / 2 > 1
