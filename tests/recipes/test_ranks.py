"""Recipes on two ranks: the same weights on both, and metrics of the whole split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from recipes.nyuv2 import NYUV2
from recipes.scenes import write_celeba
from tests.support.dense_files import write_random
from tests.support.qm9_runs import cache_home, needs_the_extra
from tests.support.ranked_fits import celeba, fit, nyuv2, qm9, validate
from tests.support.ranks import RankPool

pytestmark = pytest.mark.slow

__all__ = ["cache_home"]  # A fixture.


def compared(ranks: RankPool, make: Any, root: Path, folder: Path) -> set[str]:
    """The files that the ranks wrote."""
    folder.mkdir()
    first, second = ranks.run(fit, make, root, folder)
    assert_close(second, first, rtol=0, atol=0)
    assert first["checked"] > 0
    alone = validate(make, root, folder, first["weights"])
    # Sums in another order.
    assert first["logged"] == pytest.approx(alone, rel=1e-4)
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_nyuv2(ranks: RankPool, tmp_path: Path):
    root = write_random(tmp_path / "data", NYUV2, num_train=8, num_val=6, height=32, width=32)
    written = compared(ranks, nyuv2, root, tmp_path / "out")
    assert written == {"epoch_000.png", "last_10.json"}


def test_celeba(ranks: RankPool, tmp_path: Path):
    root = write_celeba(tmp_path / "data", 17, 6, 2)
    assert "f1_val.png" in compared(ranks, celeba, root, tmp_path / "out")


@needs_the_extra
def test_qm9(ranks: RankPool, cache_home: Path, tmp_path: Path):
    compared(ranks, qm9, cache_home / "lightning_cost" / "qm9", tmp_path / "out")
