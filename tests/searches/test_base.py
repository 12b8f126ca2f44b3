"""What a search of one's own inherits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from peft import LoraConfig
from torch import nn
from torch.nn import Parameter

from lightning_cost import LevelSetSearch, PenaltySearch, Search, SearchContext
from lightning_cost.searches._adapters import left_out


class OnlyFirst(Search):
    """Reaches the first shared parameter."""

    def candidates(self, context: SearchContext) -> Iterator[None]:
        yield

    def reach(self, modules: Mapping[str, nn.Module], shared: Sequence[Parameter]) -> Sequence[Parameter]:
        return shared[:1]


def test_every_module_is_a_target_unless_a_search_says_otherwise() -> None:
    search, backbone = OnlyFirst(), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert search.rounds == 1
    assert search.is_target("backbone.0", backbone[0])
    assert search.is_target("anything", nn.Identity())
    modules, shared = {"backbone": backbone}, list(backbone.parameters())
    missing = left_out(modules, shared, search.is_target, search.reach(modules, shared))
    assert missing == ["backbone.1 (Linear)"]


@pytest.mark.parametrize(
    "make",
    [
        lambda targets: LevelSetSearch(target_modules=targets),
        lambda targets: PenaltySearch(LoraConfig(r=2, target_modules=targets)),
    ],
    ids=["level set", "penalty"],
)
def test_the_searches_of_the_library_target_modules_by_name(make: Callable[[Any], Search]) -> None:
    layer, names = nn.Linear(3, 4), ["backbone.0", "backbone.10", "decoder.1", "backbone.1"]
    chosen, everything = make(["0", "decoder.1"]), make(None)
    assert [chosen.is_target(name, layer) for name in names] == [True, False, True, False]
    assert all(everything.is_target(name, layer) for name in names)


def test_a_search_must_say_what_it_tries_and_reaches() -> None:
    with pytest.raises(TypeError, match=r"candidates.*reach"):
        Search()  # type: ignore[abstract]
