"""Import files of crystals into a store."""
