"""The two-parameter problem of CAGrad: what teleportation does, drawn."""

from recipes.toy.model import ToyModel
from recipes.toy.problem import STARTS, gap_to_front, pareto_front, pareto_stationarity, toy_losses
from recipes.toy.run import Run, train

__all__ = ["STARTS", "Run", "ToyModel", "gap_to_front", "pareto_front", "pareto_stationarity", "toy_losses", "train"]
