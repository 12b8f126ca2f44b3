"""QM9: eleven properties of small molecules, predicted from their graphs."""
