"""Multi-task training under automatic optimization: what stands behind ``MultiTaskMixin``."""
