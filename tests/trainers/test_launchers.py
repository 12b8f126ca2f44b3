"""Training scripts whose processes Lightning starts itself, also where one of them fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(strategy: str, fault: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.support.launched_fit", strategy, fault, str(path)]
    return subprocess.run(command, check=False, cwd=ROOT, timeout=150, capture_output=True, text=True)


def test_ddp_and_ddp_spawn_train_the_same(tmp_path: Path) -> None:
    states = []
    for strategy in ("ddp", "ddp_spawn"):
        result = run(strategy, "none", tmp_path / strategy)
        assert result.returncode == 0, result.stderr
        states.append(torch.load(tmp_path / strategy))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("fault", ["step of rank 0", "teleport of rank 1"])
def test_a_rank_that_fails_leaves_no_other_hanging(fault: str, tmp_path: Path) -> None:
    result = run("ddp", fault, tmp_path / "none")
    assert result.returncode != 0
    assert "a fault on one rank" in result.stderr
