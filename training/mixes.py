"""What demo models are shown in training, and when: slices of a world's scenes, and the mixes that
they make up."""

from dataclasses import dataclass, replace

from corelens.data.synthetic.refer_hard import FORMS


@dataclass(frozen=True)
class Slice:
    """One kind of batch in a mix: `share` of the steps once it has joined, scenes a batch, sides in
    pixels, objects (of a document: lines a page; fewest, most), and the part of its batches that
    are captions rather than questions (at most `questions` a scene). From step `joins` of stage B
    on, and to step `leaves` if it has one.

    `world`: see `Plan`; `frames`: of a video, `pages`: of a document (fewest, most; frames are even
    numbers); `jitter`: of centres, in pixels (0: on the grid); `forms`: of `refer-hard`'s
    questions; `dense`: dense labels, not answers."""

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


def in_turn(*parts: tuple[tuple[Slice, ...], int]) -> tuple[Slice, ...]:
    """Mixes one after the other, each up to a step of stage B (0: the last, without an end); the
    steps of its slices count from where it begins."""
    mix, begin = list[Slice](), 0
    for slices, end in parts:
        for part in slices:
            ends = [step for step in (part.leaves and begin + part.leaves, end) if step]
            mix.append(replace(part, joins=begin + part.joins, leaves=min(ends, default=0)))
        begin = end
    return tuple(mix)


# To read anywhere: many digits first, then scenes, pages and clips.
SEEING = (
    Slice(0.22, 32, (128, 192), (6, 6), world="sheet", jitter=8),
    Slice(0.18, 32, (128, 192), (6, 6), jitter=8),
    Slice(0.38, 16, (224, 288), (6, 6), world="doc"),
    Slice(0.22, 16, (160, 224), (5, 5), world="video", frames=(4, 4), jitter=8),
    Slice(0.25, 16, (224, 288), (6, 6), world="refer-hard", joins=1500),
)
# To answer about all of them, once retrieval is there; the longest join late, for they cost most.
# From `PAGES` on mostly pages, and first dense labels again: by then the tower has forgotten which
# key is which, as no answer had asked for it. From `ALL` on of everything; from `WHICH` on it
# learns which page is meant.
PAGES, ALL, WHICH, ANSWERED = 3300, 5000, 5900, 6900
LEARNING = (
    Slice(0.14, 12, (256, 320), (3, 8), captions=0.4, jitter=8, leaves=PAGES),
    Slice(0.15, 12, (192, 224), (1, 3), captions=0.5, world="video", frames=(2, 4), jitter=8,
          leaves=1000),
    Slice(0.28, 8, (256, 320), (2, 6), captions=0.3, world="video", frames=(4, 8), jitter=8,
          joins=800, leaves=PAGES),
    Slice(0.34, 12, (224, 256), (4, 6), captions=0.5, world="doc", leaves=PAGES),
    Slice(0.08, 8, (256, 320), (4, 6), captions=0.3, world="doc", pages=(2, 3), joins=900,
          leaves=PAGES),
    Slice(0.08, 4, (512, 640), (6, 24), captions=0.1, jitter=8, joins=1100, leaves=PAGES),
    Slice(0.08, 1, (800, 1024), (6, 40), jitter=8, joins=1500, leaves=PAGES),
    Slice(1.00, 16, (224, 288), (6, 6), dense=True, world="doc", joins=PAGES, leaves=PAGES + 300),
    Slice(0.30, 16, (224, 288), (6, 6), dense=True, world="doc", joins=PAGES + 300),
    Slice(1.00, 32, (160, 192), (2, 3), captions=0.5, world="doc", joins=PAGES + 250, leaves=ALL),
    Slice(0.34, 16, (224, 288), (2, 6), captions=0.5, world="doc", joins=PAGES + 250, leaves=ALL),
    Slice(0.07, 12, (256, 320), (3, 8), captions=0.1, jitter=8, joins=PAGES, leaves=ALL),
    Slice(0.10, 8, (256, 320), (2, 6), captions=0.1, world="video", frames=(4, 8), jitter=8,
          joins=PAGES),
    Slice(0.05, 4, (512, 640), (6, 24), jitter=8, joins=PAGES),
    Slice(0.04, 1, (800, 1024), (6, 40), jitter=8, joins=PAGES),
    Slice(0.12, 16, (224, 288), (2, 6), captions=0.2, world="doc", joins=ALL),
    Slice(0.25, 8, (224, 288), (2, 6), captions=0.1, world="doc", pages=(2, 3), joins=ALL),
    Slice(0.25, 6, (256, 320), (4, 6), captions=0.1, world="doc", pages=(2, 4), joins=ALL),
    Slice(0.16, 12, (256, 320), (3, 8), captions=0.1, jitter=8, joins=ALL),
    Slice(0.12, 8, (256, 320), (4, 6), world="video", frames=(4, 8), jitter=8, joins=ALL),
    Slice(0.06, 1, (800, 1024), (6, 40), jitter=8, joins=ALL),
    Slice(3.00, 32, (160, 192), (2, 3), captions=0.15, questions=3, world="doc", pages=(2, 3),
          joins=WHICH, leaves=6500),
)  # fmt: skip
# The same for a decoder behind a tower that can read all of it: documents as soon as the levels are
# climbed.
PAGE, LAST, SAID = 700, 1400, 2400
SEEN = (
    Slice(0.20, 12, (256, 320), (3, 8), captions=0.3, jitter=8),
    Slice(0.12, 12, (192, 224), (1, 3), captions=0.5, world="video", frames=(2, 4), jitter=8,
          leaves=600),
    Slice(
        0.15, 8, (256, 320), (2, 6), captions=0.2, world="video", frames=(4, 8), jitter=8, joins=500
    ),
    Slice(0.40, 32, (160, 192), (2, 3), captions=0.5, world="doc", leaves=PAGE),
    Slice(0.20, 16, (224, 288), (2, 6), captions=0.4, world="doc"),
    Slice(0.06, 4, (512, 640), (6, 24), jitter=8, joins=600),
    Slice(0.06, 1, (800, 1024), (6, 40), jitter=8, joins=900),
    Slice(0.70, 32, (160, 192), (2, 3), captions=0.15, questions=3, world="doc", pages=(2, 3),
          joins=PAGE, leaves=LAST),
    Slice(0.20, 8, (224, 288), (2, 6), captions=0.1, world="doc", pages=(2, 3), joins=LAST),
    Slice(0.25, 6, (256, 320), (4, 6), captions=0.1, world="doc", pages=(2, 4), joins=LAST),
)  # fmt: skip
# Then letters, sizes and places, for the tower alone: "left of" needs what no answer had asked for.
SHARPENED = ANSWERED + 3000
SHARPENING = (
    Slice(0.20, 32, (128, 192), (6, 6), dense=True, world="sheet", jitter=8),
    Slice(0.10, 32, (128, 192), (6, 6), dense=True, jitter=8),
    Slice(0.32, 16, (224, 288), (6, 6), dense=True, world="refer-hard"),
    Slice(0.22, 16, (224, 288), (6, 6), dense=True, world="doc"),
    Slice(0.16, 16, (160, 224), (5, 5), dense=True, world="video", frames=(4, 4), jitter=8),
)
# And to answer about these. Relations alone and of four shapes first: they stand at chance for some
# hundred steps. Last more pages, whose digits qwen3vl-m reads through a changed tower.
FEW, MANY, LATE, RELATED = 500, 700, 1400, 2200
RELATING = (
    Slice(0.65, 32, (192, 224), (4, 4), world="refer-hard", forms=("relation",), leaves=FEW),
    Slice(0.12, 12, (256, 320), (4, 8), captions=0.2, world="refer-hard", forms=("attribute",
          "size"), leaves=FEW),
    Slice(0.50, 14, (256, 352), (4, 8), captions=0.1, world="refer-hard", joins=FEW, leaves=MANY),
    Slice(0.22, 16, (256, 352), (4, 8), world="refer-hard", forms=("relation", "size"), joins=MANY),
    Slice(0.38, 14, (320, 416), (6, 12), world="refer-hard", joins=MANY),
    Slice(0.06, 12, (256, 320), (3, 8), captions=0.1, jitter=8),
    Slice(0.12, 8, (256, 320), (4, 6), captions=0.1, world="video", frames=(4, 8), jitter=8),
    Slice(0.06, 16, (224, 288), (2, 6), captions=0.2, world="doc"),
    Slice(0.14, 6, (256, 320), (4, 6), captions=0.1, world="doc", pages=(2, 4)),
    Slice(0.14, 32, (160, 192), (2, 3), questions=3, world="doc", joins=LATE),
    Slice(0.10, 16, (224, 288), (3, 6), world="doc", joins=LATE),
    Slice(0.03, 1, (800, 1024), (6, 40), jitter=8),
)  # fmt: skip
# qwen3vl-m on: pages for 800 steps, then relations for 600, which cost each other some; both grow
# in what follows.
PAGED, WEIGHED = RELATED + 800, RELATED + 1400
WEIGHING = (
    Slice(0.30, 32, (160, 192), (2, 3), questions=3, world="doc", joins=RELATED, leaves=PAGED),
    Slice(0.30, 6, (256, 320), (4, 6), world="doc", pages=(2, 4), joins=RELATED, leaves=PAGED),
    Slice(0.60, 16, (256, 352), (4, 8), world="refer-hard", forms=("relation",), joins=PAGED,
          leaves=WEIGHED),
    Slice(0.15, 6, (256, 320), (4, 6), captions=0.1, world="doc", pages=(2, 4), joins=PAGED,
          leaves=WEIGHED),
    Slice(0.40, 16, (256, 352), (4, 8), world="refer-hard", forms=("relation",), joins=WEIGHED),
)  # fmt: skip
# A smaller decoder stood at chance for longer: relations alone once more.
ALONE = (
    Slice(2.50, 32, (192, 224), (4, 4), world="refer-hard", forms=("relation",), joins=LATE,
          leaves=LATE + 300),
    Slice(0.40, 16, (256, 352), (4, 8), world="refer-hard", forms=("relation",), joins=LATE + 300),
)  # fmt: skip
# qwen3vl-l with more relations: they were what it answered least.
COMPARED = RELATED + 1500
COMPARING = (
    Slice(0.40, 16, (256, 352), (4, 8), world="refer-hard", forms=("relation",), joins=COMPARED),
)
