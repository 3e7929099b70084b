"""Tools around training. A tool imports the core and no other tool."""
