"""Look into data sets: describe them, find repeats, compare two."""
