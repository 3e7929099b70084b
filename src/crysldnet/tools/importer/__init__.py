"""Import structure files into a store."""
