"""The commands that docs/paper.md names for the tables and figures of the paper exist, and take their arguments."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
TABLE = [line for line in PAGE.splitlines() if line.startswith("| ")]
PYTHON = sorted({command for line in TABLE for command in re.findall(r"`python -m ([^`]+)`", line)})
MAKE = sorted({target for line in TABLE for target in re.findall(r"`make ([a-z0-9-]+)`", line)})
TESTS = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]


def help_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Run `python -m` with the arguments and `--help`, in this process, and return the exit status."""
    module, *others = arguments
    # argparse reads from left to right, so it refuses a wrong argument before it comes to the help.
    monkeypatch.setattr(sys, "argv", [module, *others, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return end.value.code


def test_the_table_names_commands() -> None:
    assert len(PYTHON) >= 10
    assert MAKE == ["demo", "toy"]


@pytest.mark.parametrize("command", PYTHON)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_takes_its_arguments(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert help_of(shlex.split(command), monkeypatch) == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_wrong_argument_would_be_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(["recipes.study", "digits", "--preset", "no-such-preset"], monkeypatch) == 2
    assert "no-such-preset" in capsys.readouterr().err


@pytest.mark.parametrize("module", sorted({command.split()[0] for command in PYTHON}))
def test_a_command_has_a_test(module: str) -> None:
    if (ROOT / module.replace(".", "/") / "__main__.py").exists():
        module += ".__main__"
    package, _, name = module.rpartition(".")
    imports = re.compile(rf"from {re.escape(module)} import|from {re.escape(package)} import .*\b{name}\b")
    assert [path for path in TESTS if imports.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("target", MAKE)
def test_a_target_of_make_runs_a_module_with_a_test(target: str) -> None:
    recipe = re.search(rf"^{target}:.*\n\t.*-m (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    test_a_command_has_a_test(recipe[1])
