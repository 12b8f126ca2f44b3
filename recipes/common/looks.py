"""Which steps of a training are looked at."""

from __future__ import annotations

import random

__all__ = ["is_looked_at"]


def is_looked_at(step: int, every: int) -> bool:
    """Whether a step is the one of its `every` steps that is looked at, which is drawn at random.

    At random, because what is done in every second or tenth step must be as frequent among the steps that are looked at
    as among the others: the difference of their times is what looking costs. The same steps are drawn in every run.

    Args:
        step: Number of the optimizer step, from 0.
        every: One of so many steps is looked at.
    """
    window, place = divmod(step, every)
    return place == random.Random(window).randrange(every)
