"""Tabular models: kernel ridge, trees, and their combination; plain arrays after fitting."""
