"""The tables of the COST paper from finished runs: one command a table."""

from recipes.tables.benchmarks import BENCHMARKS, Benchmark, Column
from recipes.tables.runs import COSTS, METHOD_LAYERS, Run, result_of
from recipes.tables.table import Row, rows_of

__all__ = ["BENCHMARKS", "COSTS", "METHOD_LAYERS", "Benchmark", "Column", "Row", "Run", "result_of", "rows_of"]
