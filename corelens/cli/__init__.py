"""The command `corelens`."""
