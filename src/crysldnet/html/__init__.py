"""Self-contained HTML pages: template, tables, drawings."""
