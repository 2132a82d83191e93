"""World `doc`, after MMDocIR: rendered pages, one image each, of short key–value lines; the
question asks one code.

A page is paper with a heading on top, lines such as "Total 47" in several sizes at varied places,
grey bars where other text would stand, and its number at the foot. "What is the code of Total on
page 2?" is asked where the key stands on several pages, each time with another value (decoys),
"What is the code of Total?" where it stands on one page alone. Some page's heading says the asked
key too, without a value ("Total Summary"). The asked value occurs once in the whole document.
"""

from dataclasses import replace

import numpy as np

from corelens.data.synthetic.drawing import Number, Query, draw_number, smallest
from corelens.data.synthetic.fonts import font
from corelens.data.synthetic.pages import FOOT, MARGIN, Line, Page, paint
from corelens.data.synthetic.refer import draw_size, stream
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

KEYS = (
    "Total",
    "Invoice",
    "Order",
    "Date",
    "Name",
    "Amount",
    "Account",
    "Ticket",
    "Room",
    "Price",
    "Tax",
)
HEADINGS = ("Report", "Summary", "Index", "Notes")
MINIMUM = {"pages": 2, "lines": 4, "side": 256, "digits": 2, "named": 0.5}
"""The documented minimum of difficulty: below it no number is published. (256 px a side are 64
visual tokens of 32.)"""
LONG = {"pages": 12, "lines": 6, "sides": (640, 768), "clutter": 24}
"""A long context: 12 pages of 400 to 576 visual tokens of 32 × 32 pixels."""

_WORLD = 1_000_002  # in the entropy of the random stream
_HEADING = 26  # font size in pixels
_GAP, _BAR = 5, 14  # pixels: between any two rows, height of a row of grey bars


def doc(
    n: int,
    seed: int = 0,
    *,
    pages: Number = 3,
    lines: Number = 5,
    sides: tuple[int, int] = (256, 320),
    fonts: tuple[int, int] = (16, 24),
    digits: int = 2,
    named: float = 0.5,
    clutter: int = 3,
    turn: int = 0,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: pages, "What is the code of Total on page 2?", "47", and the box around that
    line on that page.

    Args:
        n: how many.
        seed: sample i of a seed is always the same document, whatever `n`.
        pages: pages in a document, 1 to 40, or (fewest, most). Published numbers need 2 or more.
        lines: key–value lines a page, 1 to 10, or (fewest, most), drawn for each page. Published
            numbers need 4.
        sides: smallest and largest side of a page in pixels; width and height are drawn apart, in
            steps of 32, once a document. Published numbers need 256 or more.
        fonts: smallest and largest font size of a line, in pixels; where lines do not fit, the
            largest get smaller.
        digits: of a value, 1 to 4. Published numbers need 2 or more.
        named: the share of questions whose key stands on several pages and that therefore name the
            page (none in a document of one page). Published numbers need 0.5 or more.
        clutter: at most so many rows of grey bars a page, where there is room.
        turn: the asked value counted on by so many (after the last comes the first, and values that
            stand elsewhere in the document are passed over); all else stays as it is, to the pixel.
        split: "test" (everyone's), "train" or "validation"; see `refer`.

    Raises:
        CorelensError: for a document that is impossible (more lines than a page has room or keys
            for).
    """
    samples = []
    minimum = MINIMUM
    for i in range(n):
        rng = stream(split, _WORLD, seed, i)
        size = draw_size(rng, sides)
        document, asked = draw_document(
            rng, *size, pages, lines, fonts, digits, named, clutter, turn
        )
        published = (
            min(smallest(pages) / minimum["pages"], smallest(lines) / minimum["lines"]) >= 1
            and min(
                sides[0] / minimum["side"], digits / minimum["digits"], named / minimum["named"]
            )
            >= 1
        )
        sheets = [
            {
                "heading": page.heading,
                "lines": [
                    {"key": x.key, "value": x.value, "size": x.size, "box": x.box.bounds}
                    for x in page.lines
                ],
            }
            for page in document
        ]
        sample = ask(document, *asked).sample(
            "doc", f"doc-{seed}-{i:04d}", split=split, published=published, pages=sheets
        )
        sample.meta["page"] = asked[0]
        sample.images = [paint(page) for page in document]
        samples.append(sample)
    return samples


def draw_document(
    rng: np.random.Generator,
    width: int,
    height: int,
    pages: Number = 3,
    lines: Number = 5,
    fonts: tuple[int, int] = (16, 24),
    digits: int = 2,
    named: float = 0.5,
    clutter: int = 3,
    turn: int = 0,
) -> tuple[list[Page], tuple[int, int]]:
    """A document of pages of `width` × `height` pixels, and (page, line) of what shall be asked;
    arguments as in `doc`.

    Any other line can be asked too, with `ask`.
    """
    if not (1 <= digits <= 4 and 0 <= named <= 1 and 8 <= fonts[0] <= fonts[1]):
        raise CorelensError(
            f"digits={digits}, named={named}, fonts={fonts}",
            "1 to 4 digits, a share from 0 to 1, fonts from 8 px (smallest, largest)",
            "ask for a document that can be drawn",
        )
    count = draw_number(rng, pages, "pages", 1, 40)
    rows = [draw_number(rng, lines, "lines", 1, len(KEYS) - 1) for _ in range(count)]
    keys, (page, line) = _keys(rng, rows, repeated=count > 1 and bool(rng.random() < named))
    values = _values(rng, [len(names) for names in keys], (page, line), digits)
    headings = [str(rng.choice(KEYS)) for _ in keys]
    headings[int(rng.integers(count))] = keys[page][line]
    document = []
    for number, (names, codes, heading) in enumerate(zip(keys, values, headings, strict=True)):
        title = f"{heading} {rng.choice(HEADINGS)}"
        document.append(_page(rng, width, height, number, title, names, codes, fonts, clutter))
    if turn:
        document[page] = _turned(
            document[page], line, turn, {value for codes in values for value in codes}
        )
    return document, (page, line)


def ask(document: list[Page], page: int, line: int) -> Query:
    """The question of one line; it names the page if, and only if, the key stands on several.

    Raises:
        CorelensError: where the key stands twice on that page.
    """
    asked = document[page].lines[line]
    places = [
        i for i, sheet in enumerate(document) for other in sheet.lines if other.key == asked.key
    ]
    if places.count(page) > 1:
        raise CorelensError(
            f"key {asked.key!r} twice on page {page + 1}",
            "a key once a page",
            "ask for another line",
        )
    where = f" on page {page + 1}" if len(places) > 1 else ""
    box = asked.box
    region = Box(box.x0, box.y0, box.x1, box.y1, image=page, text=f"{asked.key} {asked.value}")
    form = "page" if where else "document"
    return Query(f"What is the code of {asked.key}{where}?", asked.value, [region], form, line)


# --- inside


def _keys(
    rng: np.random.Generator, rows: list[int], repeated: bool
) -> tuple[list[list[str]], tuple[int, int]]:
    """Keys of every page, each once a page, and which (page, line) is asked: its key is elsewhere
    or nowhere else."""
    page, asked = int(rng.integers(len(rows))), str(rng.choice(KEYS))
    holds = np.zeros(len(rows), bool)
    if repeated:
        holds = rng.random(len(rows)) < 0.5
        holds[(page + int(rng.integers(1, len(rows)))) % len(rows)] = True
    holds[page] = True
    others = [key for key in KEYS if key != asked]
    keys = []
    for count, has in zip(rows, holds, strict=True):
        names = [others[i] for i in rng.permutation(len(others))][: count - int(has)]
        keys.append([[asked, *names][i] for i in rng.permutation(count)] if has else names)
    return keys, (page, keys[page].index(asked))


def _values(
    rng: np.random.Generator, rows: list[int], asked: tuple[int, int], digits: int
) -> list[list[str]]:
    """Values without a leading zero; the asked one occurs once, the others too while there are
    enough."""
    low, high, total = 10 ** (digits - 1), 10**digits, sum(rows)
    own = int(rng.integers(low, high))
    pool = np.delete(np.arange(low, high), own - low)
    others = [str(x) for x in rng.choice(pool, total - 1, replace=total - 1 > len(pool))]
    place = sum(rows[: asked[0]]) + asked[1]
    flat = [*others[:place], str(own), *others[place:]]
    ends = np.cumsum(rows)
    return [flat[end - count : end] for count, end in zip(rows, ends, strict=True)]


def _turned(page: Page, line: int, turn: int, taken: set[str]) -> Page:
    """The page with a line's value counted on. Its words stay: the font's digits are equally
    wide."""
    value = page.lines[line].value
    low = 10 ** (len(value) - 1)
    free = [x for x in range(low, 10 * low) if str(x) == value or str(x) not in taken]
    other = replace(page.lines[line], value=str(free[(free.index(int(value)) + turn) % len(free)]))
    return replace(page, lines=(*page.lines[:line], other, *page.lines[line + 1 :]))


def _page(
    rng: np.random.Generator,
    width: int,
    height: int,
    number: int,
    heading: str,
    keys: list[str],
    values: list[str],
    fonts: tuple[int, int],
    clutter: int,
) -> Page:
    """Rows of lines and bars under the heading, in random order, the free height dealt out between
    them."""
    top, bottom = MARGIN + _HEADING + 8, height - MARGIN - FOOT - 2
    room, depth = width - 2 * MARGIN, bottom - top
    sizes = _sizes(rng, keys, values, room, depth, fonts)
    heights = [_height(size) for size in sizes]
    wide = [_width(key, value, size) for key, value, size in zip(keys, values, sizes, strict=True)]
    free = depth - sum(heights) - _GAP * len(heights)
    bars = min(clutter, free // (2 * (_BAR + _GAP)))
    free -= bars * (_BAR + _GAP)
    rows = [int(row) for row in rng.permutation(len(keys) + bars)]
    spare = np.floor(rng.dirichlet(np.ones(len(rows) + 1)) * free).astype(int)
    placed: dict[int, Line] = {}
    bands: list[tuple[int, int, int, int]] = []
    y = top
    for row, extra in zip(rows, spare, strict=False):
        y += int(extra) + _GAP
        if row >= len(keys):
            bands += _bars(rng, y, width)
            y += _BAR
            continue
        size = sizes[row]
        least = wide[row] - size // 4
        gap = int(rng.integers(size // 4, max(size // 4, min(2 * size, room - least)) + 1))
        x = MARGIN + int(rng.integers(room - least - gap + 1))
        placed[row] = Line(keys[row], values[row], x, y + round(0.95 * size), gap, size)
        y += heights[row]
    paper = tuple(int(x) for x in int(rng.integers(225, 253)) + rng.integers(-8, 3, 3))
    ink = tuple(int(x) for x in rng.integers(0, 60, 3))
    size = min(_HEADING, int(_HEADING * room / font(_HEADING).getlength(heading)))
    left = MARGIN + int(rng.integers(max(0, room - int(font(size).getlength(heading))) + 1))
    parts = (
        left,
        MARGIN + _HEADING - 4,
        size,
        tuple(placed[i] for i in range(len(keys))),
        tuple(bands),
    )
    return Page(
        width,
        height,
        number,
        heading,
        *parts,
        (paper[0], paper[1], paper[2]),
        (ink[0], ink[1], ink[2]),
    )


def _sizes(
    rng: np.random.Generator,
    keys: list[str],
    values: list[str],
    room: int,
    depth: int,
    fonts: tuple[int, int],
) -> list[int]:
    """A font size a line; where lines do not fit, the largest are made smaller. Raises where the
    smallest do not."""
    least, longest = fonts[0], max(_width(key, "8" * len(values[0]), fonts[0]) for key in KEYS)
    tall = (_height(least) + _GAP) * len(keys)
    if longest > room or tall > depth:
        raise CorelensError(
            f"{len(keys)} lines in a font of {least} px: {longest} × {max(tall, 0)} px",
            f"lines that fit into the {room} × {max(depth, 0)} px between heading and foot",
            "ask for fewer lines, a smaller font or larger sides",
        )
    sizes = [int(rng.integers(least, fonts[1] + 1)) for _ in keys]
    while sum(_height(size) + _GAP for size in sizes) > depth:
        sizes[int(np.argmax(sizes))] -= 1
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        while _width(key, value, sizes[i]) > room and sizes[i] > least:
            sizes[i] -= 1
    return sizes


def _height(size: int) -> int:
    """Pixels that a line takes from top to bottom."""
    return round(1.2 * size)


def _bars(rng: np.random.Generator, y: int, width: int) -> list[tuple[int, int, int, int]]:
    """A row of grey bars as long as words, over most of the page's width."""
    bars, x, end = [], MARGIN, width - MARGIN - int(rng.integers(width // 3))
    while x < end - 6:
        long = min(int(rng.integers(12, 48)), end - x)
        bars.append((x, y + 3, x + long, y + _BAR - 4))
        x += long + 6
    return bars


def _width(key: str, value: str, size: int) -> int:
    """Pixels that a line takes with the narrowest gap."""
    return sum(int(np.ceil(font(size).getlength(word))) + 1 for word in (key, value)) + size // 4
