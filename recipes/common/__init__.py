"""What the recipes share: training that is recorded, in parallel, and how methods are compared."""
