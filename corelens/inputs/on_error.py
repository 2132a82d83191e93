"""A runner's `on_error`: what is wrong with one sample stops the run, or leaves that sample out,
named and counted."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from corelens.errors import CorelensError

OnError = Literal["raise", "skip"]
T = TypeVar("T")


def check_on_error(on_error: str) -> None:
    """Raise for another word than "raise" and "skip"."""
    if on_error not in ("raise", "skip"):
        raise CorelensError(f"on_error={on_error!r}", "'raise' or 'skip'", "choose one of these")


def of_usable(
    samples: Sequence[Any],
    make: Callable[[Sequence[Any]], T],
    check: Callable[[Any], object],
    on_error: OnError,
) -> tuple[T | None, dict[int, CorelensError]]:
    """What `make` makes of one batch of samples, and {index in the batch: error} of those left out.

    Every sample is prepared once, with its batch. Only where that fails, and wrong samples are to
    be skipped, each of the batch is looked at alone, and the batch made again of the others.

    Args:
        samples: the batch.
        make: makes the result of several samples; raises a CorelensError if one of them cannot be
            used (a region that the processor crops away, say).
        check: raises a CorelensError for a sample that cannot be used, by itself.
        on_error: "raise": what `make` raises is raised. "skip": wrong samples are left out; the
            result is None where no sample is left.

    Errors: what `make` raises, if none of its samples is wrong by itself.
    """
    try:
        return make(samples), {}
    except CorelensError:
        if on_error == "raise":
            raise
        wrong = unusable(samples, check)
        if not wrong:
            raise
    usable = [sample for index, sample in enumerate(samples) if index not in wrong]
    return (make(usable) if usable else None), wrong


def unusable(samples: Sequence[Any], check: Callable[[Any], object]) -> dict[int, CorelensError]:
    """{index: error} of the samples for which `check` raises."""
    wrong = {}
    for index, sample in enumerate(samples):
        try:
            check(sample)
        except CorelensError as error:
            wrong[index] = error
    return wrong


def left_out(
    samples: Sequence[Any], wrong: dict[int, CorelensError], on_error: OnError = "skip"
) -> dict[str, str]:
    """{id: reason} of the samples that a runner leaves out, after a warning that counts them and
    says why the first is.

    Args:
        samples: all of the run.
        wrong: {index among them: error}.
        on_error: "raise": the first of these errors is raised.

    Errors: no sample is left.
    """
    if not wrong:
        return {}
    first = wrong[min(wrong)]
    if on_error == "raise":
        raise first
    skipped = {
        samples[index].id or f"number {index}": wrong[index].given for index in sorted(wrong)
    }
    if len(wrong) == len(samples):
        raise CorelensError(
            f"{len(samples)} samples, none of which can be used; {first.given}",
            first.expected,
            first.do,
        )
    names = ", ".join(list(skipped)[:5]) + (" …" if len(skipped) > 5 else "")
    warnings.warn(
        f"{len(wrong)} of {len(samples)} samples are left out ({names}): {first.given}",
        stacklevel=3,
    )
    return skipped
