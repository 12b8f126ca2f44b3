"""One teleport: search, accept or roll back, report."""
