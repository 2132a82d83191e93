"""Hook points and their names, the one attention function, rows and edges of a pattern, the running
step."""
