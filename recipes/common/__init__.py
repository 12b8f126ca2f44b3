"""What the recipes share: command lines, loaders, files, and recorded training runs."""
