"""The Makefile, run with a Python that notes its calls: what a target installs, and when."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Notes its arguments. It makes environments of itself, has no modules to run, and installs unless `broken` is there.
PYTHON = f"""#!/bin/sh
case "$*" in
"-m venv --clear "*)
    rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "venv" >> calls ;;
"-m pip --version") ;;
"-m pip install "*)
    for last; do :; done
    echo "pip $last" >> calls
    test ! -e broken ;;
"-c "*) {shlex.quote(sys.executable)} "$@" ;;
*) echo "$*" >> calls ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path: Path):
    """Runs make in a folder with a Makefile and a pyproject.toml, and returns the calls of Python."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def make(*targets: str, python: str = "./python", fails: bool = False) -> list[str]:
        (tmp_path / "calls").write_text("")
        # A make that runs the tests must not hand its options down.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        command = ["make", *targets, f"PYTHON={python}"]
        result = subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return (tmp_path / "calls").read_text().splitlines()

    return make


@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("demo", "recipes"),
        ("toy", "recipes"),
        ("scenes", "recipes"),
        ("qm9", "recipes,qm9"),
        ("test", "recipes,qm9,dev"),
    ],
)
def test_a_target_installs_what_it_needs(make, target: str, extras: str) -> None:
    environment, installed, *runs = make(target)
    assert environment == "venv"
    assert installed == f"pip .[{extras}]"
    assert len(runs) == 1


def test_a_later_target_adds_what_is_missing(make) -> None:
    assert "pip .[recipes]" in make("demo")
    assert "pip" not in " ".join(make("toy"))
    calls = make("qm9")
    assert "pip .[recipes,qm9]" in calls
    assert "venv" not in calls
    # The largest set covers the others.
    assert "pip .[recipes,qm9,docs,dev]" in make("install")
    for target in ("demo", "qm9", "test", "test-fast", "install"):
        assert "pip" not in " ".join(make(target)), target


def test_an_install_that_was_cut_short_is_taken_up_again(make, tmp_path: Path) -> None:
    make("demo")
    (tmp_path / "broken").touch()
    assert make("test", fails=True) == ["pip .[recipes,qm9,dev]"]
    (tmp_path / "broken").unlink()
    # The packages of the smaller set may have been changed half-way.
    assert "pip .[recipes]" in make("demo")
    calls = make("test")
    assert calls[0] == "pip .[recipes,qm9,dev]"
    assert "venv" not in calls


def test_new_requirements_are_installed(make, tmp_path: Path) -> None:
    make("demo")
    later = time.time() + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert "pip .[recipes]" in make("demo")


def test_an_old_python_is_refused(make, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\necho "lightning_cost needs Python >= 3.11" >&2; exit 1\n')
    old.chmod(0o755)
    assert make("demo", python="./old", fails=True) == []
    assert not (tmp_path / ".venv").exists()


def test_the_list_of_targets_is_complete() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = subprocess.run(["make", "help"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == phony.split()
