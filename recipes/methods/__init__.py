"""The multi-task methods of the paper's tables: layers for the command line of any recipe, and a registry of them."""

from recipes.methods._registry import METHODS, make_method, method_settings

__all__ = ["METHODS", "make_method", "method_settings"]
