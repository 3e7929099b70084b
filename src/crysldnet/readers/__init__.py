"""One module a file format: each turns bytes, text or records into crystals and refuses what it would have to guess."""
