"""Pages in headless Chromium, cut off from the network: no error in the console, no request, and
hover works.

Each page is opened once, as a copy with a few lines of script that hover and write what they saw
into the title.
"""

from pathlib import Path

import numpy as np
import pytest

import corelens as cl

ROOT = Path(__file__).parents[1]
HEADS = ["L1H5", "L1H9"]


@pytest.fixture(scope="module")
def demo():
    return cl.load_demo("qwen3vl-s"), cl.synthetic("refer", 1, seed=3)[0]


HOVER = (
    "const cell = all('{}')[{}], view = cell.closest('[data-live]');"
    "cell.dispatchEvent(new PointerEvent('pointerenter'));"
    "const tip = view.querySelector('.tip'), said = tip.hidden ? '' : tip.textContent;"
    "cell.dispatchEvent(new PointerEvent('pointerleave')); return tip.hidden ? said : 'stays';"
)


def test_the_browser_would_tell(browse):
    """A page that fails and asks the network for things is found out."""
    page = (
        "<body><img src='http://example.com/a.png'><script "
        "src='https://example.org/b.js'></script><script>oops()</script></body>"
    )
    _, console, network = browse(page, "return 1")
    assert network == ["http://example.com/a.png", "https://example.org/b.js"]
    assert "oops is not defined" in "".join(console)


def test_an_interactive_grid_says_head_score_and_interval(browse, tmp_path):
    rng = np.random.default_rng(0)
    scores = cl.HeadScores(per_sample=rng.random((20, 3, 5)), meta={"metric": "ram", "key": "ram"})
    cl.head_grid(scores, scores.top(k=2)).save_html(tmp_path / "grid.html")
    text, console, network = browse(
        (tmp_path / "grid.html").read_text(), HOVER.format(".cl-grid rect", 8)
    )
    low, high = scores.ci()
    assert text == f"L1H3  RAM {scores.values[1, 3]:.3g} [{low[1, 3]:.3g}, {high[1, 3]:.3g}]"
    assert not console and not network


def test_the_study_report_opens_and_unfolds(browse, tmp_path):
    from corelens.findings.result import Study

    study = Study.load(ROOT / "docs/study/report.json")
    study.write(tmp_path)
    script = (
        "const folded = all('details'); folded.forEach((part) => { part.open = true; });"
        "return folded.length + ' ' + all('table').filter((table) => table.offsetHeight > "
        "0).length;"
    )
    seen, console, network = browse(study.report.read_text(encoding="utf-8"), script)
    parts, tables = map(int, seen.split())
    assert parts >= 4 and tables >= parts
    assert not console and not network


def test_the_report_opens_with_the_headline_and_holds_an_explorer(browse, demo, tmp_path):
    """One page of at most 1,500 words and 8,000 pixels, whose tables fit 1280 pixels or scroll."""
    from corelens.findings.result import Study

    study, (model, sample) = Study.load(ROOT / "docs/study"), demo
    study.data["models"] = {"qwen3vl-s": study.data["models"]["qwen3vl-s"]}
    study.write(tmp_path, cl.explore(model, sample, heads=HEADS).part())
    script = (
        "const tiles = all('.tile .value').map((value) => value.textContent);"
        "const cell = all('[role=gridcell]')[20]; cell.click();"
        "const words = document.body.innerText.split(/\\s+/).length, tall = document.body.scrollHeight;"
        "const wide = all('table').filter((t) => t.offsetParent && t.offsetWidth > 1280 && !t.closest('.scroll')).length;"
        "return [tiles.length, all('.pinned figure').length, words < 1500, tall < 8000, wide].join('|');"
    )
    page = study.report.read_text(encoding="utf-8")
    assert page.index('class="tiles"') < page.index('id="explorer"') < page.index('class="claims"')
    seen, console, network = browse(page, script)
    assert seen == "3|3|true|true|0"
    assert not console and not network


def test_a_token_view_shows_the_head_that_is_hovered(browse, demo, tmp_path):
    model, sample = demo
    cl.viz.token_view(model, sample, HEADS).save(tmp_path / "tokens.html")
    page = (tmp_path / "tokens.html").read_text(encoding="utf-8")
    assert len(page) < 5e6 and "unpkg.com" not in page
    script = (
        "const head = all('h4').find((h) => h.textContent === 'L1H9').parentElement;"
        "const shown = () => all('h3').map((h) => h.textContent).filter((t) => "
        "t.includes('Zoomed')).join();"
        "const before = shown();"
        "head.dispatchEvent(new MouseEvent('mouseover', {bubbles: true, relatedTarget: "
        "document.body}));"
        "await wait(500); return before + ' → ' + shown();"
    )
    text, console, network = browse(page, script)
    assert text == "L1H5 Zoomed → L1H9 Zoomed"
    assert not console and not network


def test_tokens_cannot_break_out_of_a_token_view(browse):
    """CircuitsVis writes tokens into a script as they are; ours are escaped before."""
    import torch

    from corelens.viz.tokens import View, circuitsvis_html

    evil = [
        "</script><script>document.body.dataset.bad = 1</script>",
        '<img src=x onerror="document.body.dataset.bad = 1">',
    ]
    body = circuitsvis_html(torch.eye(2)[None], evil, cl.HeadSet("L0H0"))
    script = (
        "await wait(300); return all('h3').length + ' ' + (document.body.dataset.bad || 'good');"
    )
    text, console, network = browse(View("evil", body, "").page(), script)
    assert text == "2 good"
    assert not console and not network


def test_the_logit_lens_names_tokens_and_moves_through_layers(browse, demo, tmp_path):
    model, sample = demo
    lens = cl.viz.logit_lens(model, sample, layers=[0, 3, 7])
    lens.save(tmp_path / "lens.html")
    script = (
        "const slider = all('input[type=range]')[0]; slider.value = 1; slider.dispatchEvent(new "
        "Event('input'));"
        "const now = all('.now')[0].textContent, shown = all('g[data-step]').filter((g) => "
        "g.style.display !== 'none');"
        "const cell = shown[0].querySelectorAll('rect')[5]; cell.dispatchEvent(new "
        "PointerEvent('pointerenter'));"
        "return [now, shown.length, shown[0].dataset.step, all('.tip')[0].textContent].join(' | ');"
    )
    text, console, network = browse((tmp_path / "lens.html").read_text(encoding="utf-8"), script)
    position = lens.token_map.images[0].tolist()[5]
    best = ", ".join(f"‘{word}’ {probability:.2g}" for word, probability in lens.top(position, 3))
    assert text.split() == f"layer 3 | 1 | 1 | layer 3, patch {position}: {best}".split()
    assert not console and not network


def test_a_page_of_every_part_opens_without_errors(browse):
    from helpers.views import whole_page

    text, console, network = browse(whole_page(), HOVER.format(".cl-grid rect", 8))
    assert text.startswith("L1H3  RAM ") and not console and not network


@pytest.mark.parametrize("name", ["qwen3vl-qs", "qwen3vl-s"])
def test_the_explorer_opens_at_the_token_from_which_a_head_looks_hardest(browse, name, tmp_path):
    model, sample = cl.load_demo(name), cl.synthetic("refer", n=1, seed=1)[0]
    inputs = model.prepare(sample)
    with model.pattern_rows("question+last"):
        _, cache = model.run_with_cache(
            inputs, names_filter=lambda point: point.endswith("pattern_rows"), return_type=None
        )
    region = inputs.token_maps[0].region
    looks = np.stack([cache[point][0, ..., region].sum(-1).numpy() for point in cache])
    row = int(looks.max((0, 1)).argmax())  # of all layers and heads
    words = [model.to_str_tokens(inputs)[p].strip() for p in inputs.token_maps[0].question]
    page = cl.explore(model, sample).save(tmp_path / "page.html").read_text(encoding="utf-8")
    script = "return all('.reading')[0].textContent + all('.chip.on').length;"
    seen, console, _ = browse(page, script)
    place = f"from “{words[row]}”" if row < len(words) else "from the last token"
    assert place in seen and seen.endswith("1") and not console, (seen, place)
