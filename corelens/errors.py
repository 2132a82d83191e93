"""The one error of CoreLens: what was given, what was expected, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class CorelensError(ValueError):
    """Raised for every mistake a user can make; its message has three parts.

    Args:
        given: what was given, with its value.
        expected: what was expected instead.
        do: what the user can do about it.
    """

    def __init__(self, given: str, expected: str, do: str):
        self.given, self.expected, self.do = given, expected, do
        super().__init__(f"{given}\n  expected: {expected}\n  to do: {do}")

    def __reduce__(self):
        return type(self), (self.given, self.expected, self.do)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """ "did you mean 'ram'?" with the nearest of the known names, or what else to do where none is
    near."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise
