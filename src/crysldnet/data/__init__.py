"""Crystals: import, storage, neighbor lists, graphs, batches and the LightningDataModule."""
