"""One module per file format: converts bytes, text or records to crystals and rejects ambiguous input."""
