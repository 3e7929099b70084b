"""Crystals: stores, data sets, splits, targets, sampling and the LightningDataModule."""
