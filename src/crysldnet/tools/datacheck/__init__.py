"""Inspect data sets: describe them, find duplicates, compare two."""
