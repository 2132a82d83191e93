"""Worlds that CoreLens draws itself, endless and seeded, with exact regions."""

from collections.abc import Callable
from typing import Any

from corelens.data.synthetic.compare import compare
from corelens.data.synthetic.doc import doc
from corelens.data.synthetic.emoji import emoji
from corelens.data.synthetic.hop import hop
from corelens.data.synthetic.refer import refer
from corelens.data.synthetic.refer_hard import refer_hard
from corelens.data.synthetic.video import video
from corelens.errors import CorelensError, did_you_mean
from corelens.inputs.sample import Sample

WORLDS: dict[str, Callable[..., list[Sample]]] = {
    "compare": compare,
    "doc": doc,
    "emoji": emoji,
    "hop": hop,
    "refer": refer,
    "refer-hard": refer_hard,
    "video": video,
}


def worlds() -> list[str]:
    """The names that `synthetic` knows."""
    return sorted(WORLDS)


def synthetic(world: str, n: int, seed: int = 0, **options: Any) -> list[Sample]:
    """`n` samples of a synthetic world.

    The same seed gives the same samples, sample i does not depend on `n`, and no seed gives a scene
    that a demo model was trained on: training draws from a random stream of its own (see `refer`,
    option `split`).

    Args:
        world: the world's name: "refer" (shapes that carry digits), "refer-hard" (with sizes,
            letters and relations), "compare" (two shapes at once), "hop" (one shape by way of
            another), "emoji" (things on photographs), "doc" (pages of key–value lines) or "video"
            (moving shapes that show their digit for a while).
        n: how many samples.
        seed: any whole number from 0.
        options: the world's difficulty, for instance `objects=8`; see the function of that name in
            `corelens.data.synthetic`. `LONG` of `doc`, `video` and `refer_hard` there: options of a
            long context.

    Raises:
        CorelensError: for an unknown world, a negative n or seed, an unknown option or an
            impossible scene.
    """
    if world not in WORLDS:
        raise CorelensError(
            f"synthetic world {world!r}",
            f"one of {', '.join(worlds())}",
            did_you_mean(world, worlds(), "name one of these worlds"),
        )
    if n < 0 or seed < 0:
        raise CorelensError(
            f"n={n}, seed={seed}",
            "whole numbers from 0",
            "ask for a number and seed that are not negative",
        )
    try:
        return WORLDS[world](n, seed=seed, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        name = WORLDS[world].__name__
        raise CorelensError(
            f"option(s) {sorted(options)} for world {world!r}",
            f"options that this world knows ({error})",
            f"see help(corelens.data.synthetic.{name})",
        ) from None
