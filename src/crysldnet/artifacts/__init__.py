"""Files that training leaves for later use: weights with their description, provenance, calibration."""
