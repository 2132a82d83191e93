"""Hook points and their names, the one attention function, rows and edges of its pattern, the running step."""
