"""Which hook points a function of names means: the decoder's only, as TransformerLens's own code
expects.

That code filters by the end of a name (`lambda name: name.endswith("pattern")`) and takes what
comes for the decoder's tensors. Vision points, whose shapes are others, and `hook_edges`, which
holds no tensor, are meant by their full names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from corelens.errors import CorelensError
from corelens.hooks.edges import every_edges
from corelens.hooks.points import TOWERS, Hook, HookPoint

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

# Large or derived: kept in a cache only when they are named.
NOT_BY_DEFAULT = ("hook_attn_scores", "hook_pattern", "hook_pattern_rows", "hook_result")


def seen_by_functions(name: str) -> bool:
    """Whether a function of names is asked about this point."""
    return not name.startswith(TOWERS) and not name.endswith("hook_edges")


def kept_by_default(name: str) -> bool:
    """Whether a cache keeps a point that nobody named."""
    return seen_by_functions(name) and not name.endswith(NOT_BY_DEFAULT)


def matching(names: Iterable[str], means: Callable[[str], bool]) -> list[str]:
    """The decoder's names for which a function is true; an error where it is true for other points
    only."""
    names = list(names)
    if means is every_edges:
        return [name for name in names if every_edges(name)]
    matched = [name for name in names if seen_by_functions(name) and means(name)]
    if not matched and (
        others := [name for name in names if not seen_by_functions(name) and means(name)]
    ):
        raise CorelensError(
            f"a function of hook names that is true for {', '.join(others[:3])}"
            f"{' …' if len(others) > 3 else ''} and for none of the decoder's points",
            "a function that is true for some of the decoder's: it is not asked about points of "
            "towers and hook_edges",
            "give these names themselves: model.hook_names('vision.') lists them",
        )
    return matched


def points_of(hook_dict: Mapping[str, Any], names_filter: NamesFilter) -> dict[str, HookPoint]:
    """The points that a filter names; None means those that a cache keeps by default."""
    if names_filter is None or callable(names_filter):
        names: Sequence[str] = matching(hook_dict, names_filter or kept_by_default)
    else:
        names = [names_filter] if isinstance(names_filter, str) else names_filter
    return {name: hook_dict[name] for name in names}


def named(names: Iterable[str], hooks: Iterable[Hook]) -> list[Hook]:
    """Hooks of which every one has a name: a function of names becomes a hook at each point that it
    means."""
    names = list(names)
    pairs: list[Hook] = []
    for means, function in hooks:
        points = [means] if isinstance(means, str) else matching(names, means)
        pairs += [(name, function) for name in points]
    return pairs
