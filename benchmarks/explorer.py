"""The explorer in a browser: bytes of the page, time to the first paint, time of a click.

Each page is opened in headless Chromium from a server of this machine, in a copy that measures
itself. A click is a click on a token, which redraws the grid, the picture and the pinned heads, up
to the second frame after it; its script alone is measured, too. `python benchmarks/explorer.py`
prints a table and writes benchmarks/results/explorer.json; names of cases may be given.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import corelens as cl

OUT = Path(__file__).parent / "results/explorer.json"
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # words → model, world
    "one picture": ("qwen3vl-s", {}, "refer", {}),
    "another family": ("internvl-s", {}, "refer", {}),
    "8 frames": ("qwen3vl-s", {}, "video", {"frames": 8}),
    "3 pages": ("qwen3vl-s", {}, "doc", {"pages": 3}),
    "1,024 patches": ("qwen3vl-s-long", {}, "refer", {"sides": (1024, 1024), "objects": 24}),
    "smol-vlm": ("smol-vlm", {"dtype": "bfloat16"}, "refer", {}),
}
PROBE = """<script>addEventListener("load", async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  await wait(1500);
  const paint = performance.getEntriesByType("paint").find((e) => e.name === "first-contentful-paint");
  const chips = [...document.querySelectorAll(".chip:not(:disabled)")], script = [], shown = [];
  for (let i = 0; i < 20; i++) {
    const start = performance.now();
    chips[i % chips.length].click();
    script.push(performance.now() - start);
    await frame(); await frame();
    shown.push(performance.now() - start);
    await wait(50);
  }
  await fetch("/measured", { method: "POST", body: JSON.stringify(
    { first_paint_ms: paint ? paint.startTime : null, script_ms: script, shown_ms: shown }) });
});</script></body>"""


def recorded(case: str) -> cl.explorer.Explorer:
    """The explorer of a case's first sample, three heads pinned."""
    model_name, model_options, world, options = CASES[case]
    model = cl.load_demo(model_name, **model_options)
    sample = cl.synthetic(world, n=1, seed=1, **options)[0]
    explorer = cl.explore(model, sample)
    heads = [tuple(head) for head in explorer.recording["heads"][:3]]
    return cl.explore(model, sample, heads=heads)


def opened(page: str) -> dict[str, Any]:
    """What the page measures of itself in Chromium."""
    copy = page.replace("</body>", PROBE).replace(
        "default-src 'none'", "default-src 'none'; connect-src 'self'"
    )
    measured: dict[str, Any] = {}
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(copy.encode())

        def do_POST(self) -> None:
            measured.update(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [shutil.which("chromium") or "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--window-size=1280,900", f"--user-data-dir={profile}", "--remote-debugging-port=0",
             f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            if not done.wait(120):
                raise SystemExit("the page did not answer within two minutes")
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return measured


def measure(case: str) -> dict[str, Any]:
    """One case as JSON."""
    explorer = recorded(case)
    page, recording = explorer.page(), explorer.recording
    measured = opened(page)
    model_name, _, world, options = CASES[case]
    return {
        "model": model_name, "world": world, "options": options, "page_bytes": len(page.encode()),
        "patches": recording["maps"]["visual"], "views": len(recording["views"]),
        "heads": recording["shape"][0] * recording["shape"][1], "maps": len(recording["heads"]),
        "first_paint_ms": measured["first_paint_ms"], "clicks": len(measured["script_ms"]),
        "click_script_ms": statistics.median(measured["script_ms"]),
        "click_script_worst_ms": max(measured["script_ms"]),
        "click_shown_ms": statistics.median(measured["shown_ms"]),
        "left_out": recording["left_out"],
    }  # fmt: skip


def main(cases: list[str]) -> None:
    """Measure the cases; those that are not measured now stay as they were."""
    results = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    for case in cases or CASES:
        results[case] = measure(case)
        run = results[case]
        print(
            f"{case}: {run['page_bytes'] / 1000:.0f} kB, first paint {run['first_paint_ms']:.0f} ms, click "
            f"{run['click_script_ms']:.0f} ms (to the screen {run['click_shown_ms']:.0f} ms)"
        )
        OUT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
