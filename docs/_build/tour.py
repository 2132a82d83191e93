"""Make the README's moving picture and the social picture: `python docs/_build/tour.py` (needs
Chromium).

The example page (docs/examples/explorer.html) is photographed in the states of a short tour, each
reached by the address that a reader could copy; Pillow draws a pointer between them and joins them.
"""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from measured import knockout_sentence
from PIL import Image, ImageDraw

DOCS = Path(__file__).parents[1]
PAGE = DOCS / "examples/explorer.html"
WIDE = 1000  # of the window; it is as high as the page, so that nothing is cut off
SHOWN = 840  # of the moving picture
MOST = 2_000_000  # bytes of the moving picture
TOUR = (  # what the pointer does, the address that shows it, milliseconds
    (None, "rows=7&head=135&by=region", 1700),  # the first picture is all that some ever see
    ("[data-head='131']", "rows=7&head=131&by=region", 1300),
    ("[data-head='8']", "rows=7&head=8&by=region", 1500),
    (".chip.is-question:nth-of-type(11)", "rows=6&head=8&by=region", 1300),
    ("[data-head='2']", "rows=6&head=2&by=region", 1300),
    ("[data-head='120']", "rows=6&head=120&by=region", 1500),
    ("[data-rows=last]", "rows=last&head=120&by=region", 1600),
)
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const middle = (selector) => {
    const area = document.querySelector(selector).getBoundingClientRect();
    return [area.x + area.width / 2, area.y + area.height / 2]; };
  const end = document.querySelector("footer").getBoundingClientRect().bottom;
  document.title = "PLACES:" + JSON.stringify([[0, Math.ceil(end)], ...SELECTORS.map(middle)]);
}, 200));</script></body>"""


def chromium(*options: str) -> str:
    """Run Chromium without a window; what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        command = [shutil.which("chromium") or "chromium", "--headless", "--no-sandbox"]
        command += ["--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
        command += [f"--user-data-dir={profile}"]
        return subprocess.run(
            [*command, *options], check=True, capture_output=True, text=True
        ).stdout


def photograph(address: str, size: tuple[int, int], folder: Path) -> Image.Image:
    """A page as it looks in a window of this size (Chromium's own has room for its bars, in which
    it draws no pictures)."""
    picture = folder / "picture.png"
    chromium(f"--window-size={size[0]},{size[1] + 200}", f"--screenshot={picture}", address)
    return Image.open(picture).convert("RGB").crop((0, 0, *size))


def places(selectors: list[str], folder: Path) -> tuple[int, list[tuple[float, float]]]:
    """How high the page is, and where the middles of these elements are in the window."""
    copy = folder / "probe.html"
    probe = PROBE.replace("SELECTORS", json.dumps(selectors))
    copy.write_text(PAGE.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    page = chromium(f"--window-size={WIDE},1000", "--dump-dom", f"file://{copy}#pins=&rows=7")
    written = re.search(r"<title>PLACES:(.*?)</title>", page)
    assert written is not None, page[:500]
    (_, high), *middles = json.loads(html.unescape(written[1]))
    return high + 20, [tuple(place) for place in middles]


def with_pointer(picture: Image.Image, place: tuple[float, float]) -> Image.Image:
    """A picture with an arrow whose tip is at this place."""
    picture = picture.copy()
    arrow = [(0, 0), (0, 22), (5, 17), (9, 26), (13, 24), (9, 16), (16, 16)]
    draw = ImageDraw.Draw(picture)
    draw.polygon(
        [(place[0] + x, place[1] + y) for x, y in arrow], fill="#111111", outline="#ffffff"
    )
    return picture


def film(folder: Path) -> Path:
    """The tour as one GIF: every state, and the pointer's way to the next."""
    high, ways = places([selector for selector, _, _ in TOUR if selector], folder)
    addresses = [f"file://{PAGE}#pins=&{address}" for _, address, _ in TOUR]
    states = [photograph(address, (WIDE, high), folder) for address in addresses]
    place = (640.0, 600.0)
    frames, durations = [with_pointer(states[0], place)], [TOUR[0][2]]
    for before, after, way, (_, _, duration) in zip(
        states, states[1:], ways, TOUR[1:], strict=False
    ):
        for part in (0.35, 0.75, 1.0):
            between = tuple(a + (b - a) * part for a, b in zip(place, way, strict=True))
            frames.append(with_pointer(before, between))
            durations.append(70)
        place = way
        frames.append(with_pointer(after, place))
        durations.append(duration)
    size = (SHOWN, SHOWN * high // WIDE)
    small = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    every = Image.new("RGB", (size[0], size[1] * len(small[::4])))
    for number, frame in enumerate(small[::4]):  # each way of the pointer has four frames
        every.paste(frame, (0, number * size[1]))
    palette = every.quantize(256, kmeans=4, dither=Image.Dither.NONE)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in small]
    path = DOCS / "images/explorer.gif"
    drawn[0].save(
        path, save_all=True, append_images=drawn[1:], duration=durations, loop=0, optimize=True
    )
    assert path.stat().st_size < MOST, path.stat().st_size
    return path


SOCIAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; width: 1280px; height: 640px; background: #fdfdfc; color: #22262b;
  position: relative; overflow: hidden; font: 30px/1.35 Inter, system-ui, sans-serif; }}
div {{ position: absolute; left: 64px; top: 72px; width: 500px; }}
h1 {{ font-size: 66px; line-height: 1; margin: 0 0 30px; letter-spacing: -.02em; }}
p {{ margin: 0 0 30px; }} b {{ color: #c25400; }}
img {{ position: absolute; left: 600px; top: 104px; width: 660px; border-radius: 12px;
  border: 1px solid #d9dcdf; }}
</style><div><h1>CoreLens</h1>
<p>Finds the attention heads of a vision-language model that fetch the evidence for its answer.</p>
<p>Hide the evidence from <b>{k} of {total} heads</b>: accuracy falls from {clean} to <b>{top}</b>.
From {k} random heads: {low} to {high}.</p>
</div><img src="{picture}">"""


def social(folder: Path) -> Path:
    """The picture of 1280 × 640 that a link to the repository shows."""
    page, path = folder / "social.html", DOCS / "images/social.png"
    photograph(f"file://{PAGE}#{TOUR[0][1]}&pins=", (1000, 640), folder).save(
        folder / "explorer.png"
    )
    page.write_text(SOCIAL.format(picture="explorer.png", **knockout_sentence()), encoding="utf-8")
    photograph(f"file://{page}", (1280, 640), folder).save(path, optimize=True)
    return path


def main() -> None:
    """Both pictures, and their sizes."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (film(Path(folder)), social(Path(folder))):
            print(path.relative_to(DOCS), f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
