"""Self-contained HTML pages: template, periodic table, drawings."""
