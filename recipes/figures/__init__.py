"""Figures of the paper that need runs of their own: `python -m recipes.figures`."""
