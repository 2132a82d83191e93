"""The explorer: what it records is the model's attention, its page answers to clicks, keys and
drags, its live form runs."""

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.explorer.recording import BUDGET, MOST_ROWS, _left_out, _within, record


@pytest.fixture(scope="module")
def model():
    return cl.load_demo("qwen3vl-s")


@pytest.fixture(scope="module")
def sample():
    return cl.synthetic("refer", 1, seed=3)[0]


@pytest.fixture(scope="module")
def recording(model, sample):
    return record(model, sample)


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def dense(model, sample, recording):
    """The slow way: the whole pattern of every layer, cut to the recorded rows. [row, layer, head,
    key]"""
    inputs = model.prepare(replace(sample, answer=recording["answer"]["text"]), answer=True)
    token_map = inputs.token_maps[0]
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=names)
    rows = token_map.text[token_map.text > token_map.visual.min()]
    return torch.stack(
        [cache[name][0][:, rows].transpose(0, 1) for name in names], dim=1
    ).numpy(), token_map


def test_masses_and_maps_are_the_models_attention(model, sample, recording):
    pattern, token_map = dense(model, sample, recording)
    for name, keys in (("region", token_map.region), ("picture", token_map.visual)):
        stored = array(recording["mass"][name], "<u2").reshape(pattern.shape[:3]) / 65534
        assert np.abs(stored - pattern[..., keys].sum(-1)).max() < 1e-5
    heads = recording["heads"]
    assert len(heads) == model.cfg.n_layers * model.cfg.n_heads and not recording["left_out"]
    keys = torch.cat([token_map.visual, token_map.text])
    peaks = array(recording["maps"]["peak"], "<f4").reshape(len(pattern), len(heads))
    levels = (
        array(recording["maps"]["bytes"], np.uint8).reshape(len(pattern), len(heads), len(keys))
        / 255
    )
    true = np.stack([pattern[:, layer, head][:, keys] for layer, head in heads], axis=1)
    assert (np.abs(peaks[..., None] * levels**2 - true) <= peaks[..., None] / 255 + 1e-7).all()


def test_the_answer_is_what_generate_gives(model, sample, recording):
    ids = model.generate(model.prepare(sample), max_new_tokens=8)[0]
    assert (
        recording["answer"]["text"] == model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    )
    assert recording["answer"]["p"][0] > 0.9
    assert recording["model"] == "qwen3vl-s"  # no path of the machine that made the page


def test_a_budget_leaves_maps_out_and_says_so(model, sample):
    small = record(model, sample, first=[(7, 11)], budget=20_000)
    assert len(base64.b64decode(small["maps"]["bytes"])) <= 20_000
    assert [7, 11] in small["heads"] and len(small["heads"]) < 96
    assert small["left_out"][0].startswith(
        f"Maps are kept for the {len(small['heads'])} of 96 heads"
    )


def test_without_region_without_picture(model, sample):
    blank = record(model, replace(sample, regions=[]))
    assert blank["region"] == [] and blank["views"][0]["outlines"] == []
    with pytest.raises(cl.CorelensError, match="without a picture"):
        cl.explore(model, cl.Sample(question="What digit is on the red star?", id="x"))


OPTIONS = "[...root.querySelector('select').options].map((option) => option.value).join()"


def test_a_page_without_region_offers_all_but_its_mass(model, sample, browse):
    page = cl.explore(model, replace(sample, regions=[])).page()
    script = "chips[3].click(); cells[20].click(); pointer('pointerdown', .3, .3); pointer('pointerup', .3, .3);"
    text, console, _ = browse(page, WATCH + script + f"return {OPTIONS} + '|' + reading()")
    options, reading = text.split("|")
    assert options == "picture,patch" and reading.startswith("L1H8") and "evidence" not in reading
    assert not console


def test_a_model_without_token_map_shows_text_keys_and_says_so(model, sample, browse, monkeypatch):
    def nowhere(*_):
        raise cl.CorelensError("this model", "a layout", "register_layout")

    monkeypatch.setattr(model.layout, "image_cells", nowhere)
    explorer = cl.explore(model, sample, heads=[(1, 5)])
    assert explorer.recording["views"] == [] and explorer.recording["region"] == []
    script = (
        WATCH.replace("root.querySelector('.picture canvas')", "root")
        + "cells[20].click(); const looks = chips.filter((chip) => "
        "Number(chip.style.getPropertyValue('--look')) > 0).length;"
        "return [looks > 0, root.textContent.includes('attention on text is shown'), "
        "root.textContent.includes('on one patch')].join()"
    )
    text, console, _ = browse(explorer.page(), script)
    assert text == "true,true,false" and not console


def test_of_100_000_tokens_the_page_says_what_was_left_out():
    mass = np.random.default_rng(0).random((MOST_ROWS, 36, 32)).astype(np.float32)
    heads, rows = _within(BUDGET, mass, torch.arange(MOST_ROWS), 100_000, first=[(35, 31)])
    assert (35, 31) in heads and len(heads) >= 8 and list(rows) == [MOST_ROWS - 1]
    assert len(heads) * len(rows) * 100_000 <= BUDGET
    counts = {"heads": (len(heads), 36 * 32), "rows": (len(rows), 2_000), "text": (128, 2_050)}
    assert _left_out(**counts, frames=(12, 12)) == [
        f"Maps are kept for the {len(heads)} of 1152 heads whose attention is highest.",
        "The last 1 of 2000 text tokens behind the picture are rows here.",
        "The last 128 of 2050 text tokens are shown.",
    ]
    assert _left_out(frames=(12, 300)) == ["12 of 300 frames are shown."]


def test_scores_of_another_model_are_refused(model, sample):
    with pytest.raises(cl.CorelensError, match="2 layers × 2 heads"):
        cl.explore(model, sample, cl.HeadScores(np.zeros((2, 2), np.float32)))


def test_a_hook_is_seen(model, sample, recording):
    cut = record(model, sample, hooks=cl.knockout([(3, 0)], rows="all", columns="region"))
    shape = (-1, model.cfg.n_layers, model.cfg.n_heads)
    before, after = (array(r["mass"]["region"], "<u2").reshape(shape) for r in (recording, cut))
    assert before[:, 3, 0].max() > 0 and after[:, 3, 0].max() == 0


WATCH = """
const root = document.querySelector('.cl-explorer'), reading = () => root.querySelector('.reading').textContent;
const chips = all('.chip:not(:disabled)'), cells = all('[role=gridcell]'), canvas = root.querySelector('.picture canvas');
const pointer = (kind, x, y) => { const area = canvas.getBoundingClientRect(); canvas.dispatchEvent(new PointerEvent(kind,
  { clientX: area.left + x * area.width, clientY: area.top + y * area.height, pointerId: 1, bubbles: true })); };
canvas.setPointerCapture = () => {};
"""


def test_the_page_answers_to_clicks_keys_and_drags(model, sample, browse, tmp_path):
    script = (
        WATCH
        + """
    const seen = [];
    chips[3].click(); seen.push(chips[3].classList.contains('on'));
    cells[20].click(); seen.push(reading().startsWith('L1H8'), all('.pinned figure').length === 1);
    cells[20].dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown', bubbles: true })); seen.push(reading().startsWith('L2H8'));
    pointer('pointerdown', .1, .1); pointer('pointermove', .6, .6); pointer('pointerup', .6, .6);
    seen.push(root.querySelector('select').value === 'box');
    pointer('pointerdown', .3, .3); pointer('pointerup', .3, .3);
    seen.push(root.querySelector('select').value === 'patch', all('.patch button').length === 6);
    const start = performance.now(); chips[1].click(); const took = performance.now() - start;
    await wait(300); seen.push(location.hash.includes('pins=20'));
    return seen.join() + '|' + took;
    """
    )
    page = cl.explore(
        model, replace(sample, question="<script>alert(1)</script>What digit is on the red star?")
    ).page()
    assert "<script>alert" not in page
    text, console, network = browse(page, script)
    flags, took = text.split("|")
    assert set(flags.split(",")) == {"true"}, flags
    assert not console and not network
    assert float(took) < 500


KEY = (
    "const shown = (node) => node !== null && node.offsetParent !== null;"
    "const key = () => all('.swatch').filter(shown).map((x) => x.className.split('is-')[1]).join(' ');"
)


def test_the_page_says_what_its_colours_and_controls_mean(model, sample, browse):
    """Every control has words of its own or a tooltip; the legend names what is drawn, no more."""
    script = (
        WATCH
        + KEY
        + """
    const seen = [key()];
    pointer('pointerdown', .3, .3); pointer('pointerup', .3, .3); seen.push(key());
    const silent = all('button, select, input, canvas').filter((node) => shown(node) && !node.title
      && !node.getAttribute('aria-label') && !node.closest('label'));
    seen.push(silent.length, all('[data-rows]').map((button) => button.textContent).join());
    all('[data-rows=last]')[0].click(); seen.push(reading().includes('from the last token'));
    return seen.join('|');
    """
    )
    text, console, _ = browse(cl.explore(model, sample).page(), script)
    legend, marked, silent, labels, last = text.split("|")
    assert legend == "heat evidence level" and marked == "heat evidence mark level"
    assert silent == "0" and last == "true" and not console
    assert labels == "question's tokens (mean),last token (predicts the answer)"
    blank = cl.explore(model, replace(sample, regions=[])).page()
    assert browse(blank, KEY + "return key()")[0] == "heat level"


def test_a_link_reproduces_the_view(model, sample, browse):
    page = (
        cl.explore(model, sample)
        .page()
        .replace(
            "recall();\n", "location.hash = '#rows=2&head=17&pins=3.17&by=picture'; recall();\n"
        )
    )
    text, console, _ = browse(
        page,
        WATCH
        + "return [reading(), all('.pinned figure').length, root.querySelector('select').value].join('|')",
    )
    assert text.startswith("L1H5, from") and text.endswith("|2|picture") and not console


def test_frames_and_pages(browse):
    model, world = cl.load_demo("qwen3vl-s"), cl.synthetic("video", 1, seed=0)[0]
    video = record(model, world)
    assert len(video["views"]) > 1 and {view["frame"] for view in video["views"]} >= {0, 1}
    assert video["left_out"] == []
    pages = cl.synthetic("doc", 1, seed=0)[0]
    assert len(record(model, pages)["views"]) == len(pages.images)


def test_the_page_cannot_be_written(model, sample, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cl.CorelensError, match="can be written"):
        cl.explore(model, sample).save(tmp_path / "file" / "page.html")


def test_a_front_end_without_widgets_shows_the_page(model, sample):
    explorer = cl.explore(model, sample)
    data, _ = explorer._repr_mimebundle_()
    assert data.keys() == {
        "text/html", "text/plain", "application/vnd.jupyter.widget-view+json"
    }  # fmt: skip
    assert data["text/html"].startswith('<iframe srcdoc="&lt;!doctype html&gt;')


def test_live(model, sample, recording):
    explorer = cl.explore(model, sample)
    widget = explorer.widget
    widget.receive({"pins": [[1, 5], [1, 9], [3, 10]]})
    widget.receive(
        {"box": {"view": 0, "image": 0, "frame": None, "x0": 1, "y0": 2, "x1": 60.04, "y1": 70}}
    )
    widget.receive({"run": {"question": sample.question, "kind": "knockout", "value": 4}})
    assert explorer.value["heads"] == cl.HeadSet([(1, 5), (1, 9), (3, 10)]) and explorer.value[
        "box"
    ] == cl.Box(1, 2, 60.0, 70)
    assert widget.recording["clean"]["text"] == recording["answer"]["text"]
    names = {"cl": cl, "sample": replace(sample)}
    exec(explorer.value["code"], names)
    assert names["sample"].regions == [cl.Box(1, 2, 60.0, 70)]
    assert [name for name, _ in names["hooks"]] == [name for name, _ in explorer.value["hooks"]]
    again = record(model, names["sample"], hooks=names["hooks"])
    assert again["answer"]["p"] == pytest.approx(widget.recording["answer"]["p"])


def test_a_live_mistake_is_shown_not_raised(model, sample, monkeypatch):
    widget = cl.explore(model, sample).widget
    text = []
    monkeypatch.setattr(widget, "send", text.append)
    widget.receive({"run": {"question": sample.question, "kind": "nonsense", "value": 0}})
    widget.receive({"pins": [[0, 0]]})
    widget.receive({"run": {"question": sample.question, "kind": "nonsense", "value": 0}})
    assert "nonsense" in text[-1]["error"]
