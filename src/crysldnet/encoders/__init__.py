"""Crystal graph encoders: one file an encoder, behind one protocol."""
