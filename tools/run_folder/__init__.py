"""The folder of a run: its name, its recipe, and the files that record it."""
