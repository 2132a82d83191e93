"""How each demo model is trained: how long, how fast, and what the batch of every step shall be.

A model trained from scratch climbs `LEVELS`: more objects, then more pixels, as it learns. One that has climbed them,
or that starts from a bundled one, draws its batches from the slices of a `mix` instead, if its recipe has one.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from corelens.data.synthetic.refer import COLOURS
from corelens.data.synthetic.refer_hard import FORMS
from corelens.demo.batches import Plan

LEVELS = {1: (128, 160), 2: (128, 192), 3: (160, 224), 4: (192, 256), 5: (224, 288), 6: (256, 320)}
"""Stage B's curriculum: objects in a scene → smallest and largest side in pixels. The last is the published world."""
_TWINS = (1, 3)  # colours of a scene whose shapes colour alone does not tell apart


@dataclass(frozen=True)
class Slice:
    """One kind of batch in a mix: `share` of the steps once it has joined, scenes a batch, sides in pixels, objects
    (of a document: lines a page; fewest, most), and the part of its batches that are captions rather than questions
    (at most `questions` a scene). From step `joins` of stage B on, and to step `leaves` if it has one.

    `world`: see `Plan`; `frames`: of a video, `pages`: of a document (fewest, most; frames are even numbers); `jitter`:
    of centres, in pixels (0: on the grid); `forms`: of `refer-hard`'s questions; `dense`: dense labels, not answers."""

    share: float
    batch: int
    sides: tuple[int, int]
    objects: tuple[int, int]
    captions: float = 0.0
    questions: int = 8
    joins: int = 0
    leaves: int = 0
    world: str = "refer"
    frames: tuple[int, int] = (0, 0)
    pages: tuple[int, int] = (1, 1)
    jitter: float = 0.0
    forms: tuple[str, ...] = FORMS
    dense: bool = False


@dataclass(frozen=True)
class Check:
    """Scenes that judge a model: `n` validation scenes of a world with its options (a checkpoint is chosen by the mean
    over its checks), `test` test scenes for the card, and of those `blind` for each control."""

    n: int
    options: dict[str, Any]
    world: str = "refer"
    test: int = 1000
    blind: int = 200


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. `stage_a`, `stage_b`: steps; `batch`, `last_batch`: scenes a step before and at the last
    level; `twins`: the share of batches of the full world whose scenes have one to three colours only; `sides`: of all
    pictures, instead of the level's; `muon`: of matrices, its rate as a multiple of `rate` (see `optimizer.py`);
    `logits`: the limit of QK-clip, 0 without; `dense`: the share of stage B's batches with dense labels, lest the tower
    forgets what no answer asks for yet.

    `start`: the bundled model whose weights training begins with; `start_tower`: whose tower, which then stays as it
    is; `rests`: one's own tower stays as it is in stage B. `seeing`: what stage A is shown instead of small scenes of
    `refer`, with jitter that grows over its first `ramp` steps. With a `mix`, stage B draws from it as soon as the
    model has climbed all levels (at once with a `start`), and is judged on `checks`; `jitter`: of centres while it
    climbs, in pixels; `anew`: steps of stage B at which the rate starts again, and as what.
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
    pass_caption: float = 0.75
    pass_question: float = 0.6
    sides: tuple[int, int] | tuple[()] = ()
    start_tower: str = ""
    rests: bool = False
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
# To read anywhere: many digits first, then scenes, pages and clips.
_SEEING = (
    Slice(0.22, 32, (128, 192), (6, 6), world="sheet", jitter=8),
    Slice(0.18, 32, (128, 192), (6, 6), jitter=8),
    Slice(0.38, 16, (224, 288), (6, 6), world="doc"),
    Slice(0.22, 16, (160, 224), (5, 5), world="video", frames=(4, 4), jitter=8),
)
# To answer about all of them, once retrieval is there; the longest join late, for they cost most. From `_PAGES` on
# mostly pages, and first dense labels again: by then the tower has forgotten which key is which, as no answer had asked
# for it. From `_ALL` on of everything; from `_WHICH` on it learns which page is meant.
_PAGES, _ALL, _WHICH = 3300, 5000, 5900
_LEARNING = (
    Slice(0.14, 12, (256, 320), (3, 8), captions=0.4, jitter=8, leaves=_PAGES),
    Slice(0.15, 12, (192, 224), (1, 3), captions=0.5, world="video", frames=(2, 4), jitter=8, leaves=1000),
    Slice(0.28, 8, (256, 320), (2, 6), captions=0.3, world="video", frames=(4, 8), jitter=8, joins=800, leaves=_PAGES),
    Slice(0.34, 12, (224, 256), (4, 6), captions=0.5, world="doc", leaves=_PAGES),
    Slice(0.08, 8, (256, 320), (4, 6), captions=0.3, world="doc", pages=(2, 3), joins=900, leaves=_PAGES),
    Slice(0.08, 4, (512, 640), (6, 24), captions=0.1, jitter=8, joins=1100, leaves=_PAGES),
    Slice(0.08, 1, (800, 1024), (6, 40), jitter=8, joins=1500, leaves=_PAGES),
    Slice(1.00, 16, (224, 288), (6, 6), dense=True, world="doc", joins=_PAGES, leaves=_PAGES + 300),
    Slice(0.30, 16, (224, 288), (6, 6), dense=True, world="doc", joins=_PAGES + 300),
    Slice(1.00, 32, (160, 192), (2, 3), captions=0.5, world="doc", joins=_PAGES + 250, leaves=_ALL),
    Slice(0.34, 16, (224, 288), (2, 6), captions=0.5, world="doc", joins=_PAGES + 250, leaves=_ALL),
    Slice(0.07, 12, (256, 320), (3, 8), captions=0.1, jitter=8, joins=_PAGES, leaves=_ALL),
    Slice(0.10, 8, (256, 320), (2, 6), captions=0.1, world="video", frames=(4, 8), jitter=8, joins=_PAGES),
    Slice(0.05, 4, (512, 640), (6, 24), jitter=8, joins=_PAGES),
    Slice(0.04, 1, (800, 1024), (6, 40), jitter=8, joins=_PAGES),
    Slice(0.12, 16, (224, 288), (2, 6), captions=0.2, world="doc", joins=_ALL),
    Slice(0.25, 8, (224, 288), (2, 6), captions=0.1, world="doc", pages=(2, 3), joins=_ALL),
    Slice(0.25, 6, (256, 320), (4, 6), captions=0.1, world="doc", pages=(2, 4), joins=_ALL),
    Slice(0.16, 12, (256, 320), (3, 8), captions=0.1, jitter=8, joins=_ALL),
    Slice(0.12, 8, (256, 320), (4, 6), world="video", frames=(4, 8), jitter=8, joins=_ALL),
    Slice(0.06, 1, (800, 1024), (6, 40), jitter=8, joins=_ALL),
    Slice(
        3.00,
        32,
        (160, 192),
        (2, 3),
        captions=0.15,
        questions=3,
        world="doc",
        pages=(2, 3),
        joins=_WHICH,
        leaves=_WHICH + 600,
    ),
)
# The same for a decoder behind a tower that can read all of it: documents as soon as the levels are climbed.
_PAGE, _LAST = 700, 1400
_SEEN = (
    Slice(0.20, 12, (256, 320), (3, 8), captions=0.3, jitter=8),
    Slice(0.12, 12, (192, 224), (1, 3), captions=0.5, world="video", frames=(2, 4), jitter=8, leaves=600),
    Slice(0.15, 8, (256, 320), (2, 6), captions=0.2, world="video", frames=(4, 8), jitter=8, joins=500),
    Slice(0.40, 32, (160, 192), (2, 3), captions=0.5, world="doc", leaves=_PAGE),
    Slice(0.20, 16, (224, 288), (2, 6), captions=0.4, world="doc"),
    Slice(0.06, 4, (512, 640), (6, 24), jitter=8, joins=600),
    Slice(0.06, 1, (800, 1024), (6, 40), jitter=8, joins=900),
    Slice(
        0.70, 32, (160, 192), (2, 3), captions=0.15, questions=3, world="doc", pages=(2, 3), joins=_PAGE, leaves=_LAST
    ),
    Slice(0.20, 8, (224, 288), (2, 6), captions=0.1, world="doc", pages=(2, 3), joins=_LAST),
    Slice(0.25, 6, (256, 320), (4, 6), captions=0.1, world="doc", pages=(2, 4), joins=_LAST),
)
_READS = (
    Check(100, {}),
    Check(100, {"jitter": 8}),
    Check(100, {}, "video"),
    Check(100, {}, "doc"),
    Check(40, {"sides": (960, 1024), "objects": 24, "jitter": 8}, test=200, blind=50),
)
RECIPES = {
    # The bundled one was trained before there was Muon here, in 3,500 steps: its card has that recipe.
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
    # All three worlds, off the grid, up to 1,000 visual tokens, from random weights throughout.
    # The bundled one's sheets held digits alone, and its dense labels told no places.
    "qwen3vl-m": Recipe(
        stage_a=6000,
        stage_b=6900,
        anew=((_PAGES, 1e-3), (_WHICH, 1e-3)),
        check_every=700,
        twins=0.25,
        muon=5.0,
        ramp=2000,
        jitter=8,
        seeing=_SEEING,
        mix=_LEARNING,
        checks=_READS,
    ),
}
# Smaller and larger decoders from random weights, behind the tower of qwen3vl-m.
RECIPES["qwen3vl-s-all"] = RECIPES["qwen3vl-l"] = Recipe(
    start_tower="qwen3vl-m",
    stage_a=0,
    stage_b=2400,
    check_every=800,
    twins=0.25,
    muon=5.0,
    jitter=8,
    mix=_SEEN,
    checks=_READS,
)
"""One entry a preset of `corelens.demo.build`."""


def learning_rate(step: int, recipe: Recipe) -> float:
    """Warm-up, then a cosine to the floor: in each stage, and in stage B again where the recipe says so."""
    parts = [(0, recipe.rate), (recipe.stage_a, recipe.rate)]
    parts += [(recipe.stage_a + begin, rate) for begin, rate in recipe.anew]
    begin, rate = [part for part in parts if part[0] <= step][-1]
    end = min((later for later, _ in parts if later > step), default=recipe.steps)
    at, length = step - begin, end - begin
    fall = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * at / length))
    return rate * min(1.0, (at + 1) / recipe.warmup) * fall


def plan_step(step: int, progress: dict[str, Any], recipe: Recipe) -> Plan:
    """The batch of a step. It depends on the level at the time of planning, some steps ahead of training."""
    common = {"model": progress["name"], "seed": progress["seed"], "step": step}
    rng, level = np.random.default_rng((progress["seed"], step)), progress["level"]
    if step < recipe.stage_a and recipe.seeing:
        return _from_seeing(step, rng, recipe, common)
    if step >= recipe.stage_a and recipe.mix and (recipe.start or level == max(LEVELS)):
        return _from_mix(step - recipe.stage_a, rng, recipe, common)
    if step < recipe.stage_a or (recipe.dense and rng.random() < recipe.dense):
        return Plan(form="dense", objects=8, sides=recipe.sides or (128, 192), batch=recipe.batch, **common)
    form = "caption" if step % 2 else "questions"
    last = level == max(LEVELS)
    if last and rng.random() < recipe.twins:
        # Without scenes of few colours a model settles on colour alone and guesses among equals (75 %, for 700 steps);
        # with them from the start it does not find retrieval by colour, which comes first.
        objects, colours = _between((2, level), rng), _between(_TWINS, rng)
    else:
        objects, colours = (level if rng.random() < 0.75 else _between((1, level), rng)), len(COLOURS)
    batch = recipe.last_batch if last else recipe.batch
    sides = recipe.sides or LEVELS[objects]
    return Plan(form=form, objects=objects, sides=sides, colours=colours, batch=batch, jitter=recipe.jitter, **common)


def _from_seeing(step: int, rng: np.random.Generator, recipe: Recipe, common: dict[str, Any]) -> Plan:
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
    """A batch of captions or questions, of one slice of those that have joined by this step of stage B."""
    part, colours = _slice(recipe.mix, step, rng), len(COLOURS)
    if rng.random() < recipe.twins and part.world == "refer":
        colours = _between(_TWINS, rng)
    # As many as six kinds in these colours name, and as fit: one every so many square pixels, more where it moves.
    room = min(part.objects[1], 6 * colours, part.sides[0] ** 2 // (13_000 if part.world == "video" else 8000))
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
    there = [part for part in parts if part.joins <= step and (step < part.leaves or not part.leaves)]
    shares = np.array([part.share for part in there])
    return there[int(rng.choice(len(there), p=shares / shares.sum()))]


def _between(ends: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(ends[0], ends[1] + 1))


def _frames(part: Slice, rng: np.random.Generator) -> int:
    return 2 * _between((part.frames[0] // 2, part.frames[1] // 2), rng)


def _grown(step: int, rng: np.random.Generator, recipe: Recipe) -> float:
    """The share of the jitter at a step of stage A: in every other batch the most so far, in the others less, so that
    what is learned of the grid carries outward. (From nothing, at full jitter, nothing is learned.)"""
    return min(1.0, step / recipe.ramp) * (1.0 if rng.random() < 0.5 else float(rng.random()))


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a card and a checkpoint keep it."""
    return {key: value for key, value in asdict(recipe).items() if value not in ("", ())}


def from_dict(data: dict[str, Any]) -> Recipe:
    """What `as_dict` wrote, also after JSON made lists of its tuples."""
    slices: dict[str, Any] = {
        key: tuple(Slice(**tuples(part)) for part in data.get(key, ())) for key in ("seeing", "mix")
    }
    slices["anew"] = tuple((begin, rate) for begin, rate in data.get("anew", ()))
    checks = tuple(Check(**{**check, "options": tuples(check["options"])}) for check in data.get("checks", ()))
    return Recipe(**{**tuples(data), **slices, "checks": checks})


def tuples(data: dict[str, Any]) -> dict[str, Any]:
    """Options with tuples where JSON made lists of them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
