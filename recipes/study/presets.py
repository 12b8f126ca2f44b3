"""The grids that answer one question each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recipes.common.compare import Variant
from recipes.methods import METHODS
from recipes.study.spec import Row

__all__ = ["PRESETS", "Preset", "grid"]

_CONTROLS = ("COST", "random direction", "reversed direction")


@dataclass(frozen=True)
class Preset:
    """A question, and the rows that answer it.

    Attributes:
        title: The question.
        rows: Makes the rows for a problem of a recipe.
        problem: The problem within the recipe, unless another is asked for.
    """

    title: str
    rows: Callable[[str], list[Row]]
    problem: str = "narrow"


def grid(methods: Sequence[str], callbacks: Sequence[str]) -> Callable[[str], list[Row]]:
    """Makes the rows for each method without a callback and with each of some."""
    return lambda problem: [
        Row(problem, Variant(method, callback)) for method in methods for callback in ("", *callbacks)
    ]


def _sweep(variations: Sequence[str], methods: Sequence[str], callbacks: Sequence[str]) -> Callable[[str], list[Row]]:
    """The same for some variations of the problem."""
    return lambda problem: [
        row for variation in variations for row in grid(methods, callbacks)(f"{problem}{variation}")
    ]


PRESETS: dict[str, Preset] = {
    "control": Preset(
        "Is there an effect, and is it the direction? (the positive control)", grid(["LS", "UPGrad"], _CONTROLS)
    ),
    "plug-and-play": Preset("Does COST help each method? (Tables 1 to 3 and 5)", grid(list(METHODS), ["COST"])),
    "ablation": Preset(
        "Which part of the paper's method matters? (Table 4)",
        grid(["FairGrad"], ["L_t", "L_g", "L_t + L_g", "paper"]),
    ),
    "triggers": Preset(
        "When to teleport? (Table 7, Fig. 10)",
        grid(["FairGrad"], ["COST", "any", "weak", "majority 0.5", "majority 0.3", "majority 0.15", "running mean"]),
        "many",
    ),
    "adapters": Preset(
        "Which adapter? (Table 8)", grid(["FairGrad"], ["COST", "LoRA adapter", "LoHa adapter", "LoKr adapter"])
    ),
    "searches": Preset("How to search?", grid(["LS"], ["COST", "full rank", "2 steps", "penalty search", "paper"])),
    "objectives": Preset(
        "What to look for?",
        grid(["LS"], [*_CONTROLS, "gradient norm", "sharpness", "flatter", "look ahead"]),
    ),
    "history": Preset(
        "What to keep of Adam's history?",
        grid(["LS"], ["COST", "history momentum", "history paper", "history reset"]),
    ),
    "rank": Preset("How large an adapter?", grid(["LS"], ["rank 1", "rank 2", "COST", "rank 10", "full rank"])),
    "interval": Preset(
        "How often?",
        grid(["LS", "UPGrad"], ["COST", "every 2 steps", "every 4 steps", "every 8 steps", "once an epoch"]),
    ),
    "equal-time": Preset(
        "Where is COST better at equal time? (found on other seeds; with its controls)",
        grid(
            ["GradDrop"],
            ["every 2 steps", "every 2 steps, random direction", "every 2 steps, reversed direction"],
        ),
    ),
    "direction": Preset(
        "Does a running mean of the direction help?",
        grid(
            ["LS", "UPGrad"], ["COST", "running direction", "running direction, every 2", "running direction, every 4"]
        ),
    ),
    "timing": Preset(
        "When in training?",
        grid(
            ["UPGrad"], ["COST", "from the start", "first third", "middle third", "last third", "last third, flatter"]
        ),
    ),
    "drops": Preset(
        "At learning-rate drops?", grid(["LS", "UPGrad"], ["COST", "after drops", "last third, flatter"]), "drops"
    ),
    "imbalance": Preset(
        "How does imbalance matter?",
        _sweep([f",loss_weights.right={weight}" for weight in (1.0, 0.3, 0.1, 0.03, 0.01)], ["LS"], ["COST"]),
    ),
    "width": Preset(
        "How does capacity matter?", _sweep([f",width={width}" for width in (4, 8, 16, 64)], ["LS"], ["COST"])
    ),
    "many": Preset("How do many tasks matter?", grid(["LS", "UPGrad", "FairGrad"], _CONTROLS), "many"),
}
