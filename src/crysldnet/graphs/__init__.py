"""Crystals, their neighbor lists and graphs, and batches of them."""
