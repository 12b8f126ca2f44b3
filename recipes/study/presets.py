"""Studies that answer one question each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recipes.common.compare import Variant
from recipes.methods import METHODS
from recipes.study.callbacks import SWEPT
from recipes.study.spec import Row

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A question, and what to compare to answer it.

    Attributes:
        title: The question.
        methods: Names of methods. Each runs without a callback and with each of the callbacks.
        callbacks: Names of callbacks.
        problem: The problem of the recipe, unless you name another one.
        variations: What to add to the name of the problem, such as `,width=8`.
    """

    title: str
    methods: Sequence[str]
    callbacks: Sequence[str]
    problem: str = "narrow"
    variations: Sequence[str] = ("",)

    def rows(self, problem: str) -> list[Row]:
        """The rows for a problem, which is named as in `find_problem`."""
        return [
            Row(f"{problem}{variation}", Variant(method, callback))
            for variation in self.variations
            for method in self.methods
            for callback in ("", *self.callbacks)
        ]


_CONTROLS = ["COST", "random direction", "reversed direction"]
_WEIGHTS = [f",loss_weights.right={weight}" for weight in (1.0, 0.3, 0.1, 0.03, 0.01)]

PRESETS: dict[str, Preset] = {
    "control": Preset(
        "Is there an effect, and is it the direction? (the positive control)", ["LS", "UPGrad"], _CONTROLS
    ),
    "plug-and-play": Preset("Does COST help each method? (Tables 1 to 3 and 5)", list(METHODS), ["COST"]),
    "ablation": Preset(
        "Which part of the paper's method matters? (Table 4)", ["FairGrad"], ["L_t", "L_g", "L_t + L_g", "paper"]
    ),
    "paper-sweep": Preset("How much do the settings matter that the paper leaves open?", ["LS"], list(SWEPT)),
    "triggers": Preset(
        "When to teleport? (Table 7, Fig. 10)",
        ["FairGrad"],
        ["COST", "any", "weak", "majority 0.5", "majority 0.3", "majority 0.15", "running mean"],
        "many",
    ),
    "adaptive-trigger": Preset(
        "Does a threshold that follows training choose better conflicts?",
        ["LS"],
        ["COST", "lowest 10%", "cosine below -0.1", "every 2 steps"],
    ),
    "adapters": Preset(
        "Which adapter? (Table 8)", ["FairGrad"], ["COST", "LoRA adapter", "LoHa adapter", "LoKr adapter"]
    ),
    "searches": Preset("How to search?", ["LS"], ["COST", "full rank", "2 steps", "penalty search", "paper"]),
    "objectives": Preset(
        "What to look for?", ["LS"], [*_CONTROLS, "gradient norm", "sharpness", "flatter", "look ahead"]
    ),
    "history": Preset(
        "What to keep of Adam's history?", ["LS"], ["COST", "history momentum", "history paper", "history reset"]
    ),
    "rank": Preset("How large an adapter?", ["LS"], ["rank 1", "rank 2", "COST", "rank 10", "full rank"]),
    "interval": Preset(
        "How often?", ["LS", "UPGrad"], ["COST", *(f"every {n} steps" for n in (2, 4, 8)), "once an epoch"]
    ),
    "equal-time": Preset(
        "Where is COST better at equal time? (found on other seeds; with its controls)",
        ["GradDrop"],
        ["every 2 steps", "every 2 steps, random direction", "every 2 steps, reversed direction"],
    ),
    "deferred": Preset(
        "Do cheap teleports pay? (with their controls)",
        ["LS", "GradDrop", "RLW", "UW", "UPGrad", "FairGrad"],
        ["COST", "mean term", "deferred", "deferred, random direction", "deferred, reversed direction"],
    ),
    "features": Preset(
        "What do cheaper aggregators cost in accuracy?",
        ["UPGrad", "FairGrad", "MGDA", "CAGrad"],
        ["features", "weights every 2", "weights every 10"],
    ),
    "direction": Preset(
        "Does a running mean of the direction help?",
        ["LS", "UPGrad"],
        ["COST", "running direction", "running direction, every 2", "running direction, every 4"],
    ),
    "timing": Preset(
        "When in training?",
        ["UPGrad"],
        ["COST", "from the start", "first third", "middle third", "last third", "last third, flatter"],
    ),
    "drops": Preset(
        "At learning-rate drops?", ["LS", "UPGrad"], ["COST", "after drops", "last third, flatter"], "drops"
    ),
    "imbalance": Preset("How does imbalance matter?", ["LS"], ["COST"], variations=_WEIGHTS),
    "width": Preset(
        "How does capacity matter?", ["LS"], ["COST"], variations=[f",width={width}" for width in (4, 8, 16, 64)]
    ),
    "many": Preset("How do many tasks matter?", ["LS", "UPGrad", "FairGrad"], _CONTROLS, "many"),
}
