"""Files written by training for later use: weights with metadata, provenance, calibration."""
