"""Which heads: Head is one attention head, HeadSet an ordered set of them."""

import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from corelens.errors import CorelensError


class Head(NamedTuple):
    """One attention head; layers and heads count from 0. `str(Head(3, 5)) == "L3H5"`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def of(cls, value: Any) -> "Head":
        """A Head from a Head, a pair (layer, head) or a name "L3H5"."""
        if isinstance(value, str):
            name = re.fullmatch(r"[Ll](\d+)[Hh](\d+)", value.strip())
            if name:
                return cls(int(name[1]), int(name[2]))
        else:
            try:
                layer, head = value
                if int(layer) == layer and int(head) == head and layer >= 0 and head >= 0:
                    return cls(int(layer), int(head))
            except (TypeError, ValueError):
                pass
        raise CorelensError(
            f"{value!r} as a head",
            'a pair (layer, head) or a name like "L3H5", both counted from 0',
            "for one head write HeadSet([(3, 5)])",
        )


class HeadSet(AbstractSet):
    """Heads in a given order, none twice. Two sets are equal when they hold the same heads, in
    whatever order.

    Args:
        heads: Heads, pairs (layer, head) or names "L3H5"; a single Head or name is a set of one.
    """

    def __init__(self, heads: "Iterable[Any] | Head | str" = ()):
        names = [heads] if isinstance(heads, (str, Head)) else heads
        if not isinstance(names, Iterable):
            choose = "choose some of them: scores.top(0.05)" if hasattr(names, "top") else None
            raise CorelensError(
                f"{heads!r} as heads",
                "several heads",
                choose or 'HeadSet([(3, 5)]) or HeadSet(["L3H5"])',
            )
        self._heads = tuple(dict.fromkeys(Head.of(head) for head in names))
        self._lookup = frozenset(self._heads)

    def __iter__(self) -> Iterator[Head]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __contains__(self, head: Any) -> bool:
        try:
            return Head.of(head) in self._lookup
        except CorelensError:
            return False

    def __getitem__(self, index: "int | slice") -> "Head | HeadSet":
        return HeadSet(self._heads[index]) if isinstance(index, slice) else self._heads[index]

    def __eq__(self, other: object) -> bool:
        return self._lookup == other._lookup if isinstance(other, HeadSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._lookup)

    def __or__(self, other: Iterable[Any]) -> "HeadSet":
        return HeadSet([*self, *HeadSet(other)])

    def __and__(self, other: Iterable[Any]) -> "HeadSet":
        other = HeadSet(other)
        return HeadSet(head for head in self if head in other)

    def __sub__(self, other: Iterable[Any]) -> "HeadSet":
        other = HeadSet(other)
        return HeadSet(head for head in self if head not in other)

    def __repr__(self) -> str:
        return f"HeadSet([{', '.join(str(head) for head in self)}])"

    def by_layer(self) -> dict[int, list[int]]:
        """{layer: [heads]}, layers ascending, the heads of a layer in the set's order."""
        layers: dict[int, list[int]] = {}
        for layer, head in self:
            layers.setdefault(layer, []).append(head)
        return dict(sorted(layers.items()))

    def check(self, n_layers: int, n_heads: int) -> "HeadSet":
        """This set, or an error if a head of it does not exist in a model of `n_layers` ×
        `n_heads`."""
        wrong = [head for head in self if head.layer >= n_layers or head.head >= n_heads]
        if wrong:
            raise CorelensError(
                f"{', '.join(map(str, wrong[:5]))}: heads of another model",
                f"heads of a model of {n_layers} layers × {n_heads} heads (L0H0 to "
                f"L{n_layers - 1}H{n_heads - 1})",
                "take heads from scores of this very model",
            )
        return self

    def mask(self, n_layers: int, n_heads: int) -> Bool[np.ndarray, "layer head"]:
        """True where a head is in the set."""
        mask = np.zeros((n_layers, n_heads), dtype=bool)
        for head in self.check(n_layers, n_heads):
            mask[head] = True
        return mask

    def plot(self, n_layers: int | None = None, n_heads: int | None = None, ax: Any = None) -> Any:
        """The heads as marks on the layer × head grid, a matplotlib figure; the model's size makes
        it whole."""
        from corelens.viz.head_marks import head_marks

        return head_marks(self, n_layers, n_heads, ax)

    def _repr_html_(self) -> str:
        from corelens.viz.head_marks import heads_html

        return heads_html(self)

    def to_json(self) -> list[list[int]]:
        """[[layer, head], …] in the set's order; `HeadSet(…)` reads it back."""
        return [list(head) for head in self]
