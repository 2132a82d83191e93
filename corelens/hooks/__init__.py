"""Hook points and their names, the one attention function, rows and edges of the attention pattern, the running step."""
