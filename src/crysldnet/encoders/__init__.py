"""Crystal graph encoders, one per file, with a common protocol."""
