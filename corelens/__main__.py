"""`python -m corelens` is the command `corelens`."""

from corelens.cli import main

main()
