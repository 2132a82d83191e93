"""`python -m corelens` is the command `corelens`."""

from corelens.cli.app import main

main()
