"""Hook points and their names, the one attention function, rows and edges of the pattern, the running step."""
