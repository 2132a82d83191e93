"""The explorer in a browser: bytes of the page, time to the first paint, time of a click.

Each page is opened in headless Chromium from a server of this machine, in a copy that measures
itself. A click is measured from its start until the next frame is drawn: on a token, which redraws
the grid, the picture and the pinned heads; on a head, which pins or unpins it; on a patch.
`python benchmarks/explorer.py` prints a table and writes benchmarks/results/explorer.json; names
of cases may be given.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import corelens as cl

OUT = Path(__file__).parent / "results/explorer.json"
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # words → model, world
    "one picture": ("qwen3vl-s", {}, "refer", {}),
    "another family": ("internvl-q", {}, "refer", {}),
    "8 frames": ("qwen3vl-s", {}, "video", {"frames": 8}),
    "3 pages": ("qwen3vl-s", {}, "doc", {"pages": 3}),
    "1,024 patches": ("qwen3vl-m", {}, "refer", {"sides": (1024, 1024), "objects": 24}),
    "smol-vlm": ("smol-vlm", {"dtype": "bfloat16"}, "refer", {}),
}
OPENED = 3  # times a page is opened
CLICKS = 24  # of each kind, each time
KINDS = ("token", "head", "patch")
PROBE = """<script>addEventListener("load", async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const nextFrame = () => new Promise((done) => requestAnimationFrame(() => {
    const behind = new MessageChannel();  // its message comes when the frame's work is done
    behind.port1.onmessage = done;
    behind.port2.postMessage(null);
  }));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const tokens = all(".chip:not(:disabled)"), heads = all("[role=gridcell]:not(.none)");
  const canvas = document.querySelector(".picture canvas");
  canvas.setPointerCapture = () => {};
  const onPatch = (i) => {
    const area = canvas.getBoundingClientRect(), part = 0.1 + 0.8 * ((7 * i) % CLICKS) / CLICKS;
    for (const kind of ["pointerdown", "pointerup"])
      canvas.dispatchEvent(new PointerEvent(kind, { pointerId: 1, bubbles: true,
        clientX: area.left + part * area.width, clientY: area.top + (1 - part) * area.height }));
  };
  const kinds = { token: (i) => tokens[i % tokens.length].click(), patch: onPatch,
                  head: (i) => heads[(5 * (i >> 1)) % heads.length].click() };
  await wait(1500);
  const paints = performance.getEntriesByType("paint");
  const paint = paints.find((e) => e.name === "first-contentful-paint");
  const measured = { first_paint_ms: paint ? paint.startTime : null };
  for (const [kind, click] of Object.entries(kinds)) {
    const script = [], shown = [];
    for (let i = 0; i < CLICKS + 2; i++) {
      const start = performance.now();
      click(i);
      const ran = performance.now() - start;
      await nextFrame();
      // the first ones warm up
      if (i >= 2) { script.push(ran); shown.push(performance.now() - start); }
      await wait(60);
    }
    measured[kind] = { script, shown };
  }
  await fetch("/measured", { method: "POST", body: JSON.stringify(measured) });
});</script></body>""".replace("CLICKS", str(CLICKS))


def recorded(case: str) -> cl.explorer.Explorer:
    """The explorer of a case's first sample, three heads pinned beforehand."""
    model_name, model_options, world, options = CASES[case]
    model = cl.load_demo(model_name, **model_options)
    sample = cl.synthetic(world, n=1, seed=1, **options)[0]
    middle = model.cfg.n_layers // 2
    return cl.explore(model, sample, heads=[(middle, 0), (middle, 1), (middle, 2)])


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

    # Chromium opens connections in advance; a server of one thread would wait for ever on an idle
    # one
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [shutil.which("chromium") or "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            "--no-first-run",
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
    """One case as JSON; times are in milliseconds, the load is the machine's over the last
    minute."""
    explorer = recorded(case)
    page, recording = explorer.page(), explorer.recording
    runs = [opened(page) for _ in range(OPENED)]
    paints = sorted(round(run["first_paint_ms"]) for run in runs)
    model_name, _, world, options = CASES[case]
    return {
        "model": model_name, "world": world, "options": options, "page_bytes": len(page.encode()),
        "patches": recording["maps"]["visual"], "views": len(recording["views"]),
        "heads": recording["shape"][0] * recording["shape"][1], "maps": len(recording["heads"]),
        "left_out": recording["left_out"], "first_paint_ms": statistics.median(paints),
        "first_paints_ms": paints,
        "clicks": {kind: spread([run[kind] for run in runs]) for kind in KINDS},
        "load": round(os.getloadavg()[0], 1), "cores": os.cpu_count(),
    }  # fmt: skip


def spread(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Median, 10th and 90th percentile of the times until the next frame; the median of the script
    alone."""
    times = {name: [time for run in runs for time in run[name]] for name in ("shown", "script")}
    tenths = statistics.quantiles(times["shown"], n=10)
    return {
        "n": len(times["shown"]),
        "median_ms": round(statistics.median(times["shown"]), 1),
        "low_ms": round(tenths[0], 1), "high_ms": round(tenths[-1], 1),
        "script_ms": round(statistics.median(times["script"]), 1),
    }  # fmt: skip


def main(cases: list[str]) -> None:
    """Measure the cases; those that are not measured now stay as they were."""
    results = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    for case in cases or CASES:
        results[case] = measure(case)
        run = results[case]
        clicks = ", ".join(
            f"{kind} {times['median_ms']:.0f} [{times['low_ms']:.0f}, {times['high_ms']:.0f}]"
            for kind, times in run["clicks"].items()
        )
        print(
            f"{case}: {run['page_bytes'] / 1000:.0f} kB, first paint {run['first_paint_ms']} ms, "
            f"click in ms: {clicks}; load {run['load']}"
        )
        OUT.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
