"""The run-time type checker of the tests: beartype, to which an int is a float too."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
