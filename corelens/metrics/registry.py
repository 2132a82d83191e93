"""A metric by its name: `metric("ram", rows="last")`, or by the key of a result:
`metric("ram[rows=last]")`."""

import difflib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from corelens.errors import CorelensError
from corelens.metrics.calibrated_ram import CALIBRATED_RAM
from corelens.metrics.definition import Metric
from corelens.metrics.gaze import GAZE
from corelens.metrics.lift import LIFT
from corelens.metrics.localization import LOCALIZATION
from corelens.metrics.precision import PRECISION
from corelens.metrics.qr import QR
from corelens.metrics.ram import RAM, RAM_EXCESS, RAM_SHIFTED
from corelens.metrics.random import RANDOM
from corelens.metrics.retrieval import RETRIEVAL
from corelens.metrics.value_mass import VALUE_MASS
from corelens.metrics.visual_head import VISUAL_HEAD
from corelens.metrics.visual_mass import VISUAL_MASS

METRICS: dict[str, Metric] = {
    known.name: known
    for known in (
        RAM, RAM_EXCESS, RAM_SHIFTED, CALIBRATED_RAM, VISUAL_MASS, PRECISION, LIFT, GAZE, RANDOM,
        QR, VALUE_MASS,
        LOCALIZATION, RETRIEVAL, VISUAL_HEAD,
    )
}  # fmt: skip


def metric(
    name: str | Metric | Callable[..., Any],
    rows: str | None = None,
    reduce: str | None = None,
    keys: str | None = None,
    samples: str | None = None,
    sinks: str | None = None,
    **options: Any,
) -> Metric:
    """A metric with its reductions and options.

    Args:
        name: one of `metrics()`; a key as results carry it ("ram[rows=last]"); a `Metric` of your
            own; or a function f(pattern [head, row, key], token_map) → [head], whose name becomes
            the metric's.
        rows: which query rows it reads: "question" (default of most), "last", "answer", or a sum of
            names.
        reduce: over rows: "mean" (default: as published) or "max".
        keys: over the keys of the region: "sum" (default: as published), "mean", "max", or "hit": 1
            where the key that a row attends to most, of all keys, is in the region.
        samples: over samples: "mean" (default), "median", "rank_mean" or "vote" (top 5% of a
            sample's heads).
        sinks: "left_out" takes visual sinks out of the region and the picture (see
            `cl.metrics.visual_sinks`).
        options: what else the metric takes.
    Raises:
        CorelensError: a name, reduction or option that does not exist.
    """
    settings: dict[str, Any] = {
        "rows": rows,
        "reduce": reduce,
        "keys": keys,
        "samples": samples,
        "sinks": sinks,
    }
    settings = {option: value for option, value in settings.items() if value is not None} | options
    if isinstance(name, Metric):
        return name.with_options(**settings) if settings else name
    if callable(name):
        of_function, free = _of_function(name)
        return of_function.with_options(free=free, **settings) if settings else of_function
    label, written = _parse(name)
    if label not in METRICS:
        near = difflib.get_close_matches(label, METRICS, n=3, cutoff=0.4)
        raise CorelensError(
            f"the metric {label!r}",
            f"one of {', '.join(METRICS)}, or a function of your own",
            f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of these",
        )
    return METRICS[label].with_options(**{**written, **settings})


def metrics() -> tuple[str, ...]:
    """The names that `metric` knows."""
    return tuple(METRICS)


def _of_function(function: Callable[..., Any]) -> tuple[Metric, bool]:
    """(a plain function as a Metric, whether it takes any option).

    Behind pattern and token_map, parameters without a default are inputs ("layer" …), those with
    one are options.
    """
    parameters = list(inspect.signature(function).parameters.values())
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    name = getattr(function, "__name__", type(function).__name__)
    if len(parameters) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise CorelensError(
            f"the score {name!r}, a function of {len(parameters)} arguments",
            "a function of (pattern [head, row, key], token_map) that returns [head]",
            "take token_map as the second argument, also where it is not used",
        )
    further = [
        p for p in parameters[2:] if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.KEYWORD_ONLY
    ]
    needs = ("pattern", "token_map", *(p.name for p in further if p.default is p.empty))
    defaults = {p.name: p.default for p in further if p.default is not p.empty}
    reduce = defaults.pop("reduce", None)
    return Metric(name, function, needs, reduce=reduce, options=defaults, region=False), free


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    """ "ram[rows=last,reduce=max]" → ("ram", {"rows": "last", "reduce": "max"})."""
    match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(.*)\])?\s*", name)
    if match is None or (match[2] and not all("=" in part for part in match[2].split(","))):
        raise CorelensError(
            f"the metric {name!r}",
            'a name or a key like "ram[rows=last,reduce=max]"',
            "check brackets",
        )
    options = {}
    for part in match[2].split(",") if match[2] else ():
        option, value = part.split("=", 1)
        try:
            options[option.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[option.strip()] = value.strip()
    return match[1], options
