"""Pictures and pages: where the colours fall, what is escaped, and that a browser shows them
without the network."""

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores, HeadSet
from corelens.tokens.regions import Box, Mask, Tube
from corelens.viz import (
    ablation_curves,
    attention_image,
    attention_map,
    attention_overlay,
    head_grid,
    head_grid_html,
    overlay,
    sorted_scores,
    style,
)
from corelens.viz import page as pages
from helpers.views import SIZE, FakeModel, grid_boxes, scores, token_map, whole_page

# --- overlay


def test_attention_falls_on_the_pixels_of_its_patch():
    tm = token_map()
    weights = torch.zeros(tm.length)
    weights[tm.visual[8]], weights[tm.visual[23]], weights[0] = 0.5, 0.125, 0.375
    heat = attention_map(tm, weights, SIZE)
    expected = np.zeros((64, 96))
    expected[16:32, 32:48], expected[48:, 80:] = 0.5, 0.125
    assert heat.shape == (64, 96) and np.allclose(heat, expected)


def test_views_that_overlap_add_up_and_keep_the_sum():
    # tiles, then a thumbnail
    tm = token_map(boxes=grid_boxes(6, 4, 0, 0, *SIZE) + grid_boxes(3, 2, 0, 0, *SIZE))
    weights = torch.rand(tm.length, generator=torch.Generator().manual_seed(0))
    heat = attention_map(tm, weights, SIZE)
    assert heat.sum() / 256 == pytest.approx(float(weights[tm.visual].sum()), rel=1e-5)
    assert heat[0, 0] == pytest.approx(
        float(weights[tm.visual[0]] + weights[tm.visual[24]] / 4), rel=1e-5
    )
    smooth = attention_map(tm, weights, SIZE, smooth=True)
    assert smooth.sum() == pytest.approx(heat.sum(), rel=1e-3) and smooth.max() < heat.max()


def test_cells_beyond_the_picture_and_without_area_are_cut():
    tm = token_map(boxes=[[-16.0, 0, 16, 32], [80, 32, 112, 96], [0, 0, 0, 0]])
    weights = torch.ones(tm.length)
    heat = attention_map(tm, weights, SIZE)
    assert (
        heat[:32, :16].all()
        and not heat[:32, 16:].any()
        and heat[32:, 80:].all()
        and np.isfinite(heat).all()
    )


def test_coloured_where_attention_is_and_outlined_where_the_region_is():
    picture = Image.new("RGB", SIZE, (90, 110, 130))
    heat = np.zeros((64, 96))
    heat[16:32, 32:48] = 0.5
    plain = np.asarray(attention_image(picture, heat), dtype=int)
    scale = plain.shape[0] // 64
    assert plain.shape == (64 * scale, 96 * scale, 3) and scale == 5
    hot, cold = plain[24 * scale, 40 * scale], plain[5, 5]
    assert hot[0] - hot[2] > 80 > 40 > abs(cold[0] - cold[2]) and cold.min() > 150
    assert np.abs(plain[60 * scale, 90 * scale] - cold).max() == 0
    lined = np.asarray(attention_image(picture, heat, [Box(32, 16, 64, 48)]), dtype=int)
    changed = np.argwhere((lined != plain).any(-1))
    assert (changed.min(0) == [16 * scale, 32 * scale]).all() and (
        changed.max(0) < [48 * scale, 64 * scale]
    ).all()
    # the inside stays
    assert not (lined != plain)[28 * scale : 36 * scale, 44 * scale : 52 * scale].any()
    assert lined.max() == 255 and (lined[16 * scale, 40 * scale] < 20).all()


def test_a_shared_peak_keeps_a_faint_head_faint():
    picture, faint = Image.new("RGB", SIZE, "grey"), np.zeros((64, 96))
    faint[:16, :16] = 0.01
    alone, shared = (
        np.asarray(attention_image(picture, faint, peak=p), dtype=int) for p in (None, 0.5)
    )
    strength = [int(drawn[8, 8, 0] - drawn[8, 8, 2]) for drawn in (alone, shared)]
    assert strength[0] > strength[1] + 60


def test_masks_and_tubes_are_outlined_in_their_picture_and_frame():
    mask = np.zeros((64, 96), dtype=bool)
    mask[20:40, 20:30] = True
    tube = Tube({1: Box(0, 0, 16, 16)})
    frames = [Image.new("RGB", SIZE, "grey")] * 3
    flat = np.zeros((64, 96))
    changed = [
        np.asarray(attention_image(im, flat, [tube], i)).max() == 255 for i, im in enumerate(frames)
    ]
    assert changed == [False, True, False]
    assert np.asarray(attention_image(frames[0], flat, [Mask(mask)])).max() == 255


def test_overlay_figure_has_a_scale_with_its_unit_and_uses_given_axes():
    tm, picture = token_map(), Image.new("RGB", SIZE, "grey")
    weights = torch.full((tm.length,), 0.02)
    figure = attention_overlay(
        picture, tm, weights, regions=[Box(0, 0, 30, 30), Box(0, 0, 9, 9, image=1)], title="L1H2"
    )
    assert (
        figure.axes[0].get_title(loc="left") == "L1H2"
        and figure.axes[1].get_ylabel() == "attention a patch"
    )
    ax = Figure().add_subplot()
    assert attention_overlay(picture, tm, weights, ax=ax, smooth=True) is ax.figure and ax.images
    with pytest.raises(CorelensError, match="image_index=1"):
        attention_overlay(picture, tm, weights, image_index=1)
    with pytest.raises(CorelensError, match="3 weights"):
        attention_overlay(picture, tm, weights[:3])


def test_overlay_shows_the_row_that_ram_counts():
    region = Box(33, 17, 47, 31)
    tm = token_map([region])
    pattern = torch.zeros(1, 2, 3, tm.length)
    pattern[0, :, :, 0] = 1
    pattern[0, 1, 2, 0], pattern[0, 1, 2, tm.region[0]] = 0.25, 0.75
    sample = SimpleNamespace(
        images=[Image.new("RGB", SIZE, "grey")], regions=[region], video=None, question="$5 $6?"
    )
    model = FakeModel(tm, pattern)
    figure = overlay(model, sample, [(2, 1), (0, 0)], rows="question")
    assert model.asked == [
        tm.question.tolist(),
        (("blocks.0.attn.hook_pattern_rows", "blocks.2.attn.hook_pattern_rows"), None),
    ]
    row = int(tm.question[2])
    assert words_of(figure) == [
        ["the picture", "", "region outlined"],
        ["L2H1", f"from ‘t{row}’", "region 0.75, picture 0.75, peak 0.75"],
        ["L0H0", f"from ‘t{row - 2}’", "region 0.00, picture 0.00, peak 0"],
    ]
    assert (
        figure.texts[0].get_text() == "$5 $6?   ·   max over question rows"
        and not figure.texts[0].get_parse_math()
    )
    assert figure.axes[-1].get_ylabel() == "attention a patch"
    figure.savefig(io.BytesIO())  # dollars are no formula
    assert words_of(overlay(model, sample, "L2H1", reduce="mean"))[1][1:] == [
        "",
        "region 0.25, picture 0.25, peak 0.25",
    ]
    few = FakeModel(tm, pattern[:, :, :2])
    assert "rows 29, 30" in overlay(few, sample, "L2H1", rows=[30, 29]).texts[0].get_text()
    with pytest.raises(CorelensError, match="reduce='sum'"):
        overlay(model, sample, "L2H1", reduce="sum")


def words_of(figure):
    return [[text.get_text() for text in ax.texts] for ax in figure.axes if ax.texts]


def test_overlay_of_a_video_is_a_strip_of_its_frames():
    frames = torch.tensor([[0, 1]] * 24 + [[2, 3]] * 24)
    tube = Tube({0: Box(1, 1, 10, 10), 3: Box(1, 1, 10, 10)})
    tm = token_map([tube], boxes=grid_boxes(6, 4, 0, 0, *SIZE) * 2, frames=frames)
    pattern = torch.rand(1, 1, 3, tm.length).softmax(-1)
    sample = SimpleNamespace(
        images=[], regions=[tube], video=[Image.new("RGB", SIZE, "grey")] * 4, question=None
    )
    figure = overlay(FakeModel(tm, pattern), sample, [(0, 0), (1, 0)])
    assert len(figure.axes) == 3 * 4 + 1
    outlined = ["region outlined", "", "", "region outlined"]
    assert words_of(figure)[:4] == [
        [f"frame {i}", "", caption] for i, caption in enumerate(outlined)
    ]
    assert len(overlay(FakeModel(tm, pattern), sample, [(0, 0)], frames=2).axes) == 2 * 2 + 1
    weights = torch.zeros(tm.length)
    weights[tm.visual[24]] = 1.0
    assert [attention_map(tm, weights, SIZE, frame=f)[0, 0] for f in range(4)] == [0, 0, 1, 1]
    with pytest.raises(CorelensError, match="a video without a frame"):
        attention_map(tm, weights, SIZE)


# --- grids and curves


def test_head_grid_puts_layers_down_and_heads_across():
    s = scores(rows="last", reduce="mean")
    figure = head_grid(s, highlight=HeadSet([(2, 4)]))
    ax, bar = figure.axes
    mesh = ax.collections[0]
    assert np.allclose(np.asarray(mesh.get_array()).reshape(3, 5), s.values) and ax.yaxis_inverted()
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == (
        "head",
        "layer",
        "RAM (attention mass)",
    )
    assert ax.get_title(loc="left") == "last row"
    assert ax.patches[0].get_xy() == (4, 2) and mesh.get_clim()[0] == 0
    assert s.plot().axes[0].get_xlabel() == "head"
    with pytest.raises(CorelensError, match="heads of another model"):
        head_grid(s, highlight=HeadSet([(3, 0)]))


def test_scales_begin_at_zero_or_lie_around_it():
    assert style.colormap(np.array([0.2, 0.7]))[1:] == (0, 0.7)
    assert style.colormap(np.array([-0.4, 0.7]))[1:] == (-0.7, 0.7)
    assert style.colormap(np.array([-0.01, 0.7]))[1:] == (0, 0.7)
    assert style.colormap(np.zeros(3))[1:] == (0, 1)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_get_darker_or_lighter_all_the_way(dark):
    luminance = [
        np.dot([0.2126, 0.7152, 0.0722], [int(c[i : i + 2], 16) for i in (1, 3, 5)])
        for c in style.hexes(np.ones(1), 32, dark)
    ]
    steps = np.diff(luminance)
    assert (steps > 0).all() if dark else (steps < 0).all()


class Titles(HTMLParser):
    def __init__(self):
        super().__init__()
        self.titles, self.inside, self.stack = [], False, []

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "title"
        if tag not in ("meta", "link", "img", "input", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.titles.append(data)


def test_interactive_grid_says_head_score_and_interval():
    s = scores()
    parser = Titles()
    parser.feed(head_grid_html(s, highlight=HeadSet([(1, 3)])))
    low, high = s.ci()
    title = f"L1H3  RAM {s.values[1, 3]:.3g} [{low[1, 3]:.3g}, {high[1, 3]:.3g}]"
    assert len(parser.titles) == 15 and parser.titles[8] == title and parser.stack == []
    assert "[" not in Titles_of(head_grid_html(HeadScores(s.values)))[0]
    assert s._repr_html_() == head_grid_html(s) and 'class="c31 on"' in head_grid_html(
        s, highlight=s.top(k=1)
    )
    with pytest.raises(CorelensError, match="an interval of shape"):
        head_grid_html(s, ci=(np.zeros((2, 2)), np.zeros((2, 2))))
    assert "<img" not in head_grid_html(scores(metric="<img src=x>", key="<img src=x>"))


def Titles_of(markup):
    parser = Titles()
    parser.feed(markup)
    return parser.titles


def test_sorted_scores_marks_the_top_and_names_it():
    s = scores(4, 10, n=30)
    ax = sorted_scores(s, 0.1).axes[0]
    everything, top = ax.lines
    assert (
        np.allclose(everything.get_ydata(), np.sort(s.values.ravel())[::-1])
        and len(top.get_xdata()) == 4
    )
    assert [text.get_text() for text in ax.texts] == [str(head) for head in s.top(0.1)]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[0] == "95% CI" and labels[1].startswith(
        f"top 10%: 4 of 40 heads, {s.mass_of_top(0.1):.0%}"
    )


def test_ablation_curves_draw_each_choice_with_its_band():
    curves = {
        "top": [(0.1, 0.1, 0.05, 0.2), (0.05, 0.3, 0.2, 0.4)],
        "random": [(0.05, 0.9, 0.85, 0.95)],
        "mine": [(0.05, 0.5, 0.4, 0.6)],
    }
    ax = ablation_curves(curves, baseline=0.95, chance=0.1).axes[0]
    top = ax.lines[0]
    # sorted
    assert np.allclose(top.get_xdata(), [0.05, 0.1], atol=2e-3) and top.get_ydata().tolist() == [
        0.3,
        0.1,
    ]
    assert top.get_color() == style.HOT and ax.lines[1].get_color() == style.GREY
    assert (
        len({line.get_color() for line in ax.lines[:3]})
        == 3
        == len({line.get_marker() for line in ax.lines[:3]})
    )
    assert ax.get_ylabel() == "accuracy (95% CI)" and {t.get_text() for t in ax.texts} == {
        "no ablation",
        "chance",
    }
    assert [t.get_text() for t in ax.get_xticklabels()] == ["5", "10"]
    with pytest.raises(CorelensError):
        ablation_curves({"top": []})


def test_names_of_points_do_not_stand_on_one_another():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    plt.close(figure)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    near = [(f"L{i}H1", 0.3 + 0.005 * i, 0.9 - 0.004 * i) for i in range(4)] + [
        ("L9H9", 0.3, 0.01),
        ("L9H8", 0.31, 0.01),
    ]
    style.name_points(ax, near, style.HOT)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 6 and not any(
        a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]
    )
    assert min(box.y0 for box in boxes) >= ax.get_window_extent().y0 - 5


# --- pages


def tags_of(markup):
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    tags, reader = [], Reader()
    reader.feed(markup)
    return tags


def test_a_page_escapes_what_it_shows():
    tags = tags_of(whole_page())
    scripts = [attrs for tag, attrs in tags if tag == "script"]
    assert len(scripts) == 1  # the grid's own
    assert all(attrs["src"].startswith("data:") for tag, attrs in tags if tag == "img")
    assert not [attrs for _, attrs in tags if any(name.startswith("on") for name in attrs)]


def test_a_page_needs_no_network_and_says_so_to_the_browser():
    markup = whole_page()
    assert "default-src 'none'" in markup
    links = re.findall(r"url\(([^)]*)", markup) + [
        value
        for _, attrs in tags_of(markup)
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert len(links) > 20 and all(link.startswith(("#", "data:")) for link in links)
    assert "prefers-color-scheme: dark" in markup and len(markup) < 400_000


def test_ids_on_a_page_are_unique_where_they_are_used():
    markup = whole_page()
    ids = re.findall(r'\bid="([^"]+)"', markup)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', markup))
    assert used <= set(ids) and all(ids.count(name) == 1 for name in used)
    assert 'id="two"' in markup and 'id="two-2"' in markup


def test_the_same_figure_gives_the_same_markup():
    assert pages.figure(head_grid(scores()), "x") == pages.figure(head_grid(scores()), "x")


def test_numbers_stand_to_the_right_and_intervals_set_back():
    table = pages.table(
        ["heads", "accuracy", "words"],
        [["top", "4.1% [3.0, 5.4]", "low"], ["none", "–", "12 of 3"]],
    )
    assert (
        '<td class="num">4.1% <span class="ci">[3.0, 5.4]</span></td>' in table
        and "<td>12 of 3</td>" in table
    )
    assert pages.table(["a", "b"], [["x", 0.123456], ["y", -3]]).count('class="num"') == 3
