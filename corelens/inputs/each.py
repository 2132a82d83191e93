"""A runner's `on_error`: what is wrong with one sample stops the run, or leaves that sample out,
named and counted."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from corelens.errors import CorelensError

OnError = Literal["raise", "skip"]


def usable(
    samples: Sequence[Any], check: Callable[[Any], object], on_error: OnError
) -> tuple[Sequence[Any], dict[str, str]]:
    """The samples that a runner can use, and {id: reason} of those that it leaves out.

    Args:
        samples: all of them.
        check: raises a CorelensError for a sample that cannot be used (a region that the processor
            crops away, say).
        on_error: "raise": nothing is checked here, the run itself raises at the first such sample.
            "skip": every sample is checked by itself, and a warning says how many are left out, and
            why the first is.

    Errors: no sample is left; another word for `on_error`.
    """
    if on_error not in ("raise", "skip"):
        raise CorelensError(f"on_error={on_error!r}", "'raise' or 'skip'", "choose one of these")
    if on_error == "raise":
        return samples, {}
    kept, skipped = [], {}
    first: CorelensError | None = None
    for number, sample in enumerate(samples):
        try:
            check(sample)
        except CorelensError as error:
            first = first or error
            skipped[sample.id or f"number {number}"] = error.given
        else:
            kept.append(sample)
    if first is not None and not kept:
        raise CorelensError(
            f"{len(samples)} samples, none of which can be used; {first.given}",
            first.expected,
            first.do,
        )
    if first is not None:
        names = ", ".join(list(skipped)[:5]) + (" …" if len(skipped) > 5 else "")
        warnings.warn(
            f"{len(samples) - len(kept)} of {len(samples)} samples are left out ({names}): {first.given}",
            stacklevel=3,
        )
    return kept, skipped
