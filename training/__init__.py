"""How the demo models were made: recipes, scenes with labels, the optimizer, the export. `python -m
training NAME`."""
