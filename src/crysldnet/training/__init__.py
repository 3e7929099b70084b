"""Trainer, strategies, optimizers, loggers, run folders and checkpoints."""
