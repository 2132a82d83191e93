"""Shapes in signatures are checked at run time whenever the tests run."""

import html
import json
import logging
import os
import re
import shutil
import subprocess

from helpers.typecheck import check_package

# on every CPU the same product has the same bits, wherever it lies in memory
os.environ.setdefault("MKL_CBWR", "AUTO")

check_package("corelens")

import pytest  # noqa: E402
import torch  # noqa: E402

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # as many threads as there are cores, over all workers and what they start
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


# What a power cut would leave is not tested; waiting for the disk took a tenth of a study's time.
os.fsync = lambda file: None


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium():
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not browser:
        pytest.skip(
            "headless Chromium is missing: install Debian's package `chromium` (apt-get install "
            "chromium)"
        )
    return browser


@pytest.fixture
def browse(chromium, tmp_path):
    def browse(markup: str, script: str = "''") -> tuple[str, list[str], list[str]]:
        """(what the script's last value was, lines of the console, addresses that the page asked
        for)."""
        probe = (
            "<script>addEventListener('load', () => setTimeout(async () => {"
            "const wait = (ms) => new Promise((done) => setTimeout(done, ms));"
            "const all = (what) => [...document.querySelectorAll(what)];"
            f"document.title = 'SAID:' + await (async () => {{ {script} }})(); }}, 300))</script>"
        )
        assert markup.count("</body>") == 1
        page, log = tmp_path / "page.html", tmp_path / "net.json"
        page.write_text(markup.replace("</body>", f"{probe}</body>"), encoding="utf-8")
        done = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--virtual-time-budget=6000", "--dump-dom",
             f"file://{page}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        title = re.search(r"<title>SAID:(.*?)</title>", done.stdout, re.DOTALL)
        assert title, done.stdout[:2000] + done.stderr[-2000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        events = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
        # (Chromium's own requests, for updates and the like, have "not an origin" as their
        # initiator)
        asked = {e["url"] for e in events if e.get("initiator", "not an origin") != "not an origin"}
        network = sorted(url for url in asked if not url.startswith(("file:", "data:", "blob:")))
        return html.unescape(title[1]), console, network

    return browse


ANNOUNCED = re.compile(
    r"deprecat|will be removed|in a future version|will become the default", re.IGNORECASE
)


class _Announcements(logging.Handler):
    """What transformers logs, and does not warn, of changes that are to come."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        # (`cap_pixels_per_frame` is an option of a test model's own video processor, not of a call
        # of ours)
        if ANNOUNCED.search(text) and "cap_pixels_per_frame" not in text:
            self.texts.append(text)


@pytest.fixture(autouse=True)
def _no_announced_change():
    """Fail the test in which a call of ours makes transformers log that it will go away."""
    handler, logger = _Announcements(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.texts, f"transformers announces a change: {handler.texts}"
