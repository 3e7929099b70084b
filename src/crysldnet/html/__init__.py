"""HTML pages that need nothing else: frame, periodic table, drawings."""
