"""Comparing methods and callbacks over seeds: `python -m recipes.study`."""

from recipes.common.compare import Variant
from recipes.common.problem import Problem
from recipes.study.spec import Row
from recipes.study.study import Study

__all__ = ["Problem", "Row", "Study", "Variant"]
