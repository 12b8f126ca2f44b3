"""Objectives and searches by name."""

from __future__ import annotations

import pytest

from lightning_cost import ConflictAlignment, GradientNorm, LevelSetSearch, PenaltySearch
from lightning_cost._teleport.choices import choose_objective, choose_search


def test_names_stand_for_what_suits_the_mode() -> None:
    for reevaluate, objective, search in (
        (True, ConflictAlignment(), LevelSetSearch()),
        (False, ConflictAlignment(terms="mean"), LevelSetSearch(full_rank=True, backtracks=1, shrink=None)),
    ):
        assert repr(choose_objective("conflict", reevaluate)) == repr(objective)
        assert repr(choose_search("level_set", reevaluate)) == repr(search)
        assert isinstance(choose_objective("gradient_norm", reevaluate), GradientNorm)
        assert isinstance(choose_search("penalty", reevaluate), PenaltySearch)


@pytest.mark.parametrize("reevaluate", [True, False])
def test_objects_are_taken_as_they_are(reevaluate: bool) -> None:
    objective, search = ConflictAlignment(), LevelSetSearch()
    assert choose_objective(objective, reevaluate) is objective
    assert choose_search(search, reevaluate) is search
