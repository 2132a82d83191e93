"""How each demo model is trained: how long, how fast, and what the batch of every step shall be.

A model trained from scratch climbs `LEVELS`: more objects, then more pixels, as it learns. One that
has climbed them, or that starts from a bundled one, draws its batches from the slices of a `mix`
instead, if its recipe has one.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from corelens.data.synthetic.compare import FORMS as PAIRED
from corelens.data.synthetic.hop import FORMS as HOPS
from corelens.data.synthetic.refer import COLOURS
from training.batches import Plan
from training.mixes import (
    ALONE,
    ANSWERED,
    COMPARED,
    COMPARING,
    LATE,
    LEARNING,
    MANY,
    PAGED,
    PAGES,
    RELATED,
    RELATING,
    SAID,
    SEEING,
    SEEN,
    SHARPENED,
    SHARPENING,
    WEIGHED,
    WEIGHING,
    WHICH,
    Slice,
    in_turn,
)

LEVELS = {1: (128, 160), 2: (128, 192), 3: (160, 224), 4: (192, 256), 5: (224, 288), 6: (256, 320)}
"""Stage B's curriculum: objects in a scene → smallest and largest side in pixels. The last is the
published world."""
RETRIEVES = 0.95
"""The accuracy on its first check from which a model counts as one that retrieves."""


@dataclass(frozen=True)
class Check:
    """Scenes that judge a model: `n` validation scenes of a world with its options (a checkpoint is
    chosen by the mean over its checks), `test` test scenes for the card, and of those `blind` for
    each control."""

    n: int
    options: dict[str, Any]
    world: str = "refer"
    test: int = 1000
    blind: int = 200


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. `stage_a`, `stage_b`: steps; `batch`, `last_batch`: scenes a step
    before and at the last level; `twins`: the share of batches of the full world whose scenes have
    few colours only, as many as `twin_colours` says (fewest, most), so that colour alone does not
    tell their shapes apart; `sides`: of all pictures, instead of the level's; `muon`: of
    matrices, its rate as a multiple of `rate` (see `optimizer.py`); `logits`: the limit of QK-clip,
    0 without; `dense`: the share of stage B's batches with dense labels, lest the tower forgets
    what no answer asks for yet.

    `blind`: the share of stage B's batches of questions in which the rows behind a question do not
    see the picture (see `blind.py`) until step `opens` of it; from there on it falls, to none at
    step `opened`. `dropped`: the share of heads that are left out of a sample.

    `retrieval`: the step up to which a model may take to answer its first check (`RETRIEVES`); if
    it does so sooner, the steps that are left until then are skipped. `first_steps`: whether what
    the first step of a question of two finds is asked for, too, where its shape is named.

    `start`: the bundled model whose weights training begins with; `start_tower`: whose tower, which
    then stays as it is; `rests`: the step of stage B from which one's own tower stays, too (None:
    never). `seeing`: what stage A is shown instead of small scenes of `refer`, with jitter that
    grows over its first `ramp` steps. With a `mix`, stage B draws from it as soon as the model has
    climbed all levels (at once with a `start`), and is judged on `checks`; `jitter`: of centres
    while it climbs, in pixels; `anew`: steps of stage B at which the rate starts again, as what.
    """

    stage_a: int = 1300
    stage_b: int = 3700
    batch: int = 32
    last_batch: int = 24
    rate: float = 1e-3
    warmup: int = 100
    floor: float = 0.05
    clip: float = 1.0
    ahead: int = 4
    check_every: int = 250
    check_scenes: int = 400
    first_level: int = 2
    twins: float = 0.5
    twin_colours: tuple[int, int] = (1, 3)
    pass_caption: float = 0.75
    pass_question: float = 0.6
    sides: tuple[int, int] | tuple[()] = ()
    start_tower: str = ""
    rests: int | None = None
    start: str = ""
    muon: float = 0.0
    logits: float = 0.0
    dense: float = 0.0
    seeing: tuple[Slice, ...] = ()
    ramp: int = 600
    jitter: float = 0.0
    anew: tuple[tuple[int, float], ...] = ()
    mix: tuple[Slice, ...] = ()
    checks: tuple[Check, ...] = ()
    blind: float = 0.0
    opens: int = 0
    opened: int = 0
    dropped: float = 0.0
    retrieval: int = 0
    first_steps: bool = False

    @property
    def steps(self) -> int:
        return self.stage_a + self.stage_b

    @property
    def judged(self) -> tuple[Check, ...]:
        """Its checks, or the published world."""
        return self.checks or (Check(self.check_scenes, {}),)


_TILED = Recipe(
    stage_a=700,
    stage_b=2700,
    sides=(256, 256),
    batch=24,
    muon=5.0,
    dense=0.25,
    checks=(Check(200, {"sides": (256, 256)}),),
)
# A hundred scenes tell near the end too little: 99 of them were right where 943 of 1,000 test
# scenes were.
_READS = (
    Check(100, {}),
    Check(100, {"jitter": 8}),
    Check(400, {}, "refer-hard"),
    Check(400, {}, "video"),
    Check(400, {}, "doc"),
    Check(40, {"sides": (960, 1024), "objects": 24, "jitter": 8}, test=200, blind=50),
)


RECIPES = {
    # The bundled one was trained before there was Muon here, in 3,500 steps: its card has that
    # recipe.
    "qwen3vl-s": Recipe(stage_a=400, stage_b=1600, muon=5.0, check_scenes=200),
    # Pictures of 2 × 2 tiles, cut without resampling, so that shapes stay on the grid.
    # The bundled one had its dense labels in stage B from step 2,250 on: its card says so.
    "llava-ov-s": replace(_TILED, logits=20.0),
    "internvl-s": _TILED,
    # On pictures of 1,024 px the short model no longer ends its answer after the digit.
    "qwen3vl-s-long": Recipe(
        start="qwen3vl-s",
        stage_a=0,
        stage_b=900,
        rate=4e-4,
        warmup=40,
        check_every=150,
        twins=0.25,
        mix=(
            Slice(0.30, 12, (256, 320), (6, 10), captions=0.3),
            Slice(0.25, 4, (384, 512), (6, 24), captions=0.1),
            Slice(0.25, 2, (544, 768), (6, 48), joins=75),
            Slice(0.20, 1, (800, 1024), (6, 48), joins=150),
        ),
        checks=(
            Check(60, {"sides": (256, 320), "objects": 6}),
            Check(40, {"sides": (512, 640), "objects": 12}, test=200, blind=50),
            Check(30, {"sides": (960, 1024), "objects": 24}, test=200, blind=50),
        ),
    ),
    # All worlds, off the grid, up to 1,000 visual tokens, from random weights throughout.
    # The bundled one came by it in parts, and not from start to end: its card says how.
    "qwen3vl-m": Recipe(
        stage_a=6000,
        stage_b=SHARPENED + WEIGHED + 2500,
        anew=tuple((step, 1e-3) for step in (PAGES, WHICH, ANSWERED, SHARPENED))
        + tuple((SHARPENED + step, 1e-3) for step in (MANY, RELATED, PAGED, WEIGHED)),
        check_every=700,
        twins=0.25,
        muon=5.0,
        ramp=2000,
        jitter=8,
        rests=SHARPENED,
        seeing=SEEING,
        mix=in_turn((LEARNING, ANSWERED), (SHARPENING, SHARPENED), (RELATING + WEIGHING, 0)),
        checks=_READS,
    ),
}
# Decoders from random weights behind qwen3vl-m's tower; of the bundled ones until step `SAID` as it
# was unsharpened.
RECIPES["qwen3vl-l"] = Recipe(
    start_tower="qwen3vl-m",
    stage_a=0,
    stage_b=SAID + COMPARED + 600,
    anew=tuple(
        (SAID + step, rate)
        for step, rate in ((0, 1e-3), (MANY, 1e-3), (RELATED, 1e-3), (COMPARED, 7e-4))
    ),
    check_every=700,
    twins=0.25,
    muon=5.0,
    jitter=8,
    mix=in_turn((SEEN, SAID), (RELATING + COMPARING, 0)),
    checks=_READS,
)
RECIPES["qwen3vl-s-all"] = replace(
    RECIPES["qwen3vl-l"],
    stage_b=SAID + RELATED + 2800,
    anew=tuple((SAID + step, 1e-3) for step in (0, MANY, LATE, RELATED + 300)),
    mix=in_turn((SEEN, SAID), (RELATING + ALONE, 0)),
)
# Trained on to 4,000 visual tokens: a video's frames are encoded pair by pair, so that length costs
# the decoder alone.
RECIPES["qwen3vl-s-video"] = Recipe(
    start="qwen3vl-s-all",
    start_tower="qwen3vl-m",
    stage_a=0,
    stage_b=700,
    rate=5e-4,
    warmup=30,
    check_every=140,
    muon=5.0,
    mix=(
        Slice(0.25, 8, (256, 320), (3, 5), captions=0.1, world="video", frames=(4, 8), jitter=8),
        Slice(0.35, 2, (256, 320), (3, 4), captions=0.1, world="video", frames=(16, 32), jitter=8),
        Slice(0.40, 1, (320, 384), (3, 4), world="video", frames=(32, 64), jitter=8, joins=60),
    ),
    checks=(
        Check(60, {}, "video", test=200, blind=50),
        Check(30, {"frames": 32, "objects": 4, "sides": (320, 320)}, "video", test=200, blind=50),
        Check(30, {"frames": 64, "objects": 4, "sides": (352, 384)}, "video", test=200, blind=50),
    ),
)
# Made to read at the question's rows, behind qwen3vl-m's tower: 16 × 16 heads from random weights.
# The one measured was stopped on the way: its card has the lengths that it was trained with.
RECIPES["qwen3vl-q"] = Recipe(
    start_tower="qwen3vl-m",
    stage_a=0,
    stage_b=1500,
    batch=16,
    last_batch=12,
    rate=1e-3,
    warmup=50,
    check_every=100,
    twins=0.25,
    muon=5.0,
    blind=0.9,
    opens=1100,
    opened=1300,
    dropped=0.05,
    checks=(Check(150, {}),),
)
# The same model, then asked about two things at once.
RECIPES["qwen3vl-q-compare"] = replace(
    RECIPES["qwen3vl-q"],
    start="qwen3vl-q",
    stage_b=1200,
    rate=7e-4,
    warmup=30,
    check_every=200,
    twins=0.5,
    blind=0.7,
    opens=800,
    opened=1000,
    mix=(
        Slice(0.15, 16, (192, 256), (2, 6)),
        Slice(0.35, 16, (224, 288), (4, 6), world="compare", forms=("symbol",)),
        Slice(0.60, 16, (224, 288), (4, 6), questions=5, world="compare", forms=PAIRED),
        Slice(0.40, 12, (256, 320), (6, 8), questions=5, world="compare", forms=PAIRED, joins=400),
    ),
    checks=(
        Check(60, {}, test=200, blind=100),
        Check(120, {"wording": "varied"}, "compare", test=200, blind=100),
    ),
)
# And then by way of another shape. The colour or kind that the first step has to find is asked for
# alone, too, most often at first.
RECIPES["qwen3vl-q-hop"] = replace(
    RECIPES["qwen3vl-q-compare"],
    start="qwen3vl-q-compare",
    stage_b=1500,
    blind=0.5,
    opens=1000,
    opened=1250,
    mix=(
        Slice(0.10, 16, (192, 256), (2, 6)),
        Slice(0.15, 16, (224, 288), (4, 6), questions=5, world="compare", forms=PAIRED),
        Slice(0.40, 16, (224, 288), (5, 6), world="hop", forms=("trait",), leaves=300),
        Slice(0.10, 16, (224, 288), (5, 6), world="hop", forms=("trait",), joins=300),
        Slice(0.50, 16, (224, 288), (5, 6), world="hop", forms=HOPS),
        Slice(0.25, 12, (256, 320), (6, 8), world="hop", forms=HOPS, joins=500),
    ),
    checks=(
        Check(60, {}, test=200, blind=100),
        Check(60, {"wording": "varied"}, "compare", test=200, blind=100),
        Check(120, {"wording": "varied"}, "hop", test=200, blind=100),
    ),
)
# The README's model: like qwen3vl-q, small enough for the wheel (qwen3vl-s's tower, smaller MLPs),
# and trained longer, on larger batches with more twins.
RECIPES["qwen3vl-qs"] = replace(
    RECIPES["qwen3vl-q"],
    start_tower="qwen3vl-s",
    twins=0.4,
    last_batch=16,
    stage_b=1600,
    opens=1200,
    opened=1400,
)
# The same without blind batches, and so without asking the question's last token for the answer.
RECIPES["qwen3vl-qs-control"] = replace(RECIPES["qwen3vl-qs"], blind=0.0, opens=0, opened=0)
# qwen3vl-q in another family, on pictures of four tiles: 16 × 16 heads behind the tower of
# internvl-s, which lies in this model's own checkpoint now. With smaller batches and scenes of up
# to three colours it went by colour alone for 1,700 steps.
RECIPES["internvl-q"] = replace(
    RECIPES["qwen3vl-q"],
    start_tower="internvl-q",
    sides=(256, 256),
    twins=0.6,
    twin_colours=(1, 2),
    last_batch=24,
    stage_b=2400,
    opens=1900,
    opened=2100,
    checks=(Check(150, {"sides": (256, 256)}),),
)
# From random weights to questions of two steps, in three sizes. First retrieval, until `refer` is
# answered (when a model stops going by colour alone is chance). Then each step by itself, and the
# second with what the first would find in the question ("told"), beside both together. What the
# first step finds is asked for at the word that names its shape, halfway through the decoder: what
# happens without these two stands in `training/stopped.json`.
_RETRIEVED = 2500
_SHOWN: dict[str, Any] = {"batch": 16, "sides": (224, 288), "objects": (5, 6), "world": "hop"}
_LARGER: dict[str, Any] = {"sides": (256, 320), "objects": (6, 8), "questions": 5}
RECIPES["qwen3vl-hop"] = replace(
    RECIPES["qwen3vl-q"],
    stage_b=_RETRIEVED + 2200,
    retrieval=_RETRIEVED,
    first_steps=True,
    anew=((_RETRIEVED, 1e-3),),
    twins=0.5,
    twin_colours=(1, 2),
    last_batch=16,
    check_every=200,
    blind=0.8,
    opens=_RETRIEVED + 1500,
    opened=_RETRIEVED + 1900,
    mix=in_turn(
        ((Slice(1.0, 16, (224, 288), (2, 6), captions=0.5),), _RETRIEVED),
        (
            (
                Slice(0.15, 16, (224, 288), (3, 6)),
                Slice(0.35, forms=("trait",), leaves=400, **_SHOWN),
                Slice(0.15, forms=("alone",), leaves=400, **_SHOWN),
                Slice(0.10, forms=("trait", "alone"), joins=400, **_SHOWN),
                Slice(0.20, forms=("told",), **_SHOWN),
                Slice(0.15, forms=HOPS, leaves=400, **_SHOWN),
                Slice(0.35, forms=HOPS, joins=400, **_SHOWN),
                Slice(0.20, forms=HOPS, joins=400, **_SHOWN | _LARGER),
            ),
            0,
        ),
    ),
    checks=(
        Check(100, {}),
        Check(100, {"forms": ("colour",)}, "hop", test=500),
        Check(100, {"forms": ("kind",)}, "hop", test=500),
    ),
)
RECIPES["qwen3vl-hop-s"] = RECIPES["qwen3vl-hop-l"] = RECIPES["qwen3vl-hop"]
# The same without asking for what the first step finds. The one measured came by its steps in
# another order: its card has the recipe.
RECIPES["qwen3vl-hop-control"] = replace(RECIPES["qwen3vl-hop"], first_steps=False)
"""One entry a preset of `training.build`."""


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warm-up, then a cosine to the floor: in each stage, and in stage B again where the recipe
    says so."""
    parts = [(0, recipe.rate), (recipe.stage_a, recipe.rate)]
    parts += [(recipe.stage_a + begin, rate) for begin, rate in recipe.anew]
    begin, rate = [part for part in parts if part[0] <= step][-1]
    end = min((later for later, _ in parts if later > step), default=recipe.steps)
    done, length = step - begin, end - begin
    fall = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * done / length))
    return rate * min(1.0, (done + 1) / recipe.warmup) * fall


def plan_step(step: int, progress: dict[str, Any], recipe: Recipe) -> Plan:
    """The batch of a step. It depends on the level at the time of planning, some steps ahead of
    training."""
    common = {"model": progress["name"], "seed": progress["seed"], "step": step}
    rng, level = np.random.default_rng((progress["seed"], step)), progress["level"]
    if step < recipe.stage_a and recipe.seeing:
        return _from_seeing(step, rng, recipe, common)
    if step >= recipe.stage_a and recipe.mix and (recipe.start or level == max(LEVELS)):
        return _from_mix(step - recipe.stage_a + progress["skipped"], rng, recipe, common)
    if step < recipe.stage_a or (recipe.dense and rng.random() < recipe.dense):
        return Plan(
            form="dense", objects=8, sides=recipe.sides or (128, 192), batch=recipe.batch, **common
        )
    form = "caption" if step % 2 else "questions"
    last = level == max(LEVELS)
    if last and rng.random() < recipe.twins:
        # Without scenes of few colours a model settles on colour alone and guesses among equals (75
        # %, for 700 steps); with them from the start it does not find retrieval by colour, which
        # comes first.
        objects, colours = _between((2, level), rng), _between(recipe.twin_colours, rng)
    else:
        objects, colours = (
            (level if rng.random() < 0.75 else _between((1, level), rng)),
            len(COLOURS),
        )
    batch = recipe.last_batch if last else recipe.batch
    sides = recipe.sides or LEVELS[objects]
    return Plan(
        form=form,
        objects=objects,
        sides=sides,
        colours=colours,
        batch=batch,
        jitter=recipe.jitter,
        **common,
    )


def _from_seeing(
    step: int, rng: np.random.Generator, recipe: Recipe, common: dict[str, Any]
) -> Plan:
    """A batch with dense labels: as much on every picture as fits, and the jitter still growing."""
    part = _slice(recipe.seeing, step, rng)
    return Plan(
        form="dense",
        objects=part.objects[1],
        sides=part.sides,
        batch=part.batch,
        world=part.world,
        frames=_frames(part, rng),
        pages=_between(part.pages, rng),
        jitter=part.jitter * _grown(step, rng, recipe),
        **common,
    )


def _from_mix(step: int, rng: np.random.Generator, recipe: Recipe, common: dict[str, Any]) -> Plan:
    """A batch of captions or questions, of one slice of those that have joined by this step of
    stage B."""
    part, colours = _slice(recipe.mix, step, rng), len(COLOURS)
    if rng.random() < recipe.twins and part.world == "refer" and not part.dense:
        colours = _between(recipe.twin_colours, rng)
    # As many as six kinds in these colours name, and as fit: one every so many square pixels, more
    # where it moves.
    room = min(
        part.objects[1],
        6 * colours,
        part.sides[0] ** 2 // (13_000 if part.world == "video" else 8000),
    )
    if part.dense:  # as many as fit
        room = part.objects[1]
    return Plan(
        form="dense" if part.dense else "caption" if rng.random() < part.captions else "questions",
        objects=_between((min(part.objects[0], room), room), rng),
        sides=part.sides,
        colours=colours,
        batch=part.batch,
        questions=part.questions,
        world=part.world,
        frames=_frames(part, rng),
        pages=_between(part.pages, rng),
        jitter=part.jitter,
        forms=part.forms,
        **common,
    )


def _slice(parts: tuple[Slice, ...], step: int, rng: np.random.Generator) -> Slice:
    """One of those that have joined by a step of their stage, and not left, by their shares."""
    joined = [
        part for part in parts if part.joins <= step and (step < part.leaves or not part.leaves)
    ]
    shares = np.array([part.share for part in joined])
    return joined[int(rng.choice(len(joined), p=shares / shares.sum()))]


def _between(ends: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(ends[0], ends[1] + 1))


def _frames(part: Slice, rng: np.random.Generator) -> int:
    return 2 * _between((part.frames[0] // 2, part.frames[1] // 2), rng)


def _grown(step: int, rng: np.random.Generator, recipe: Recipe) -> float:
    """The share of the jitter at a step of stage A: in every other batch the most so far, in the
    others less, so that what is learned of the grid carries outward. (From nothing, at full jitter,
    nothing is learned.)"""
    return min(1.0, step / recipe.ramp) * (1.0 if rng.random() < 0.5 else float(rng.random()))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a card and a checkpoint keep it."""
    return {key: value for key, value in asdict(recipe).items() if value not in ("", (), None)}


def from_dict(data: dict[str, Any]) -> Recipe:
    """What `as_dict` wrote, also after JSON made lists of its tuples."""
    slices: dict[str, Any] = {
        key: tuple(Slice(**tuples(part)) for part in data.get(key, ())) for key in ("seeing", "mix")
    }
    slices["anew"] = tuple((begin, rate) for begin, rate in data.get("anew", ()))
    checks = tuple(
        Check(**{**check, "options": tuples(check["options"])}) for check in data.get("checks", ())
    )
    return Recipe(**{**tuples(data), **slices, "checks": checks})


def tuples(data: dict[str, Any]) -> dict[str, Any]:
    """Options with tuples where JSON made lists of them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
