"""Models on a table of features: kernel ridge, trees, and their combination; plain arrays when fitted."""
