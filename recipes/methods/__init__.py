"""The multi-task methods of the paper's tables: layers for the command line of any recipe, and a registry of them."""

from recipes.methods._registry import METHODS, make_method, method_settings
from recipes.methods.public import IMTLLossScales, PublicFairGrad

__all__ = ["METHODS", "IMTLLossScales", "PublicFairGrad", "make_method", "method_settings"]
