"""What the recipes for dense prediction share: networks and losses."""
