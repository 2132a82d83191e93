"""What pictures of a real model say: patches, the logit lens, attention between tokens, one head's
page, `show`."""

import inspect
import json
import re
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import corelens as cl
from corelens.evaluation.answers import Answer
from corelens.evaluation.contrast import ContrastPoint, SparseContrast
from corelens.interventions.result import PatchResult
from corelens.viz.heat import attention_image
from corelens.viz.lens import evenly
from corelens.viz.overlays import head_pictures
from corelens.viz.tokens import segment_attention, segments
from helpers.views import SIZE, FakeModel, scores, token_map

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def model():
    return cl.load_demo("qwen3vl-s")


@pytest.fixture(scope="module")
def samples():
    return cl.synthetic("refer", 6, seed=4)


# --- patching on the picture


def result(**axes):
    shape = [len(labels) for labels in axes.values()]
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, *shape)).astype(np.float32)
    return PatchResult(
        values,
        np.zeros(4, np.float32),
        np.ones(4, np.float32),
        axes,
        meta={"metric": "logit difference"},
    )


def test_patches_of_the_picture_stand_on_the_axis_and_on_the_picture():
    tm, picture = token_map(), Image.new("RGB", SIZE, "grey")
    inputs = SimpleNamespace(token_maps=[tm], pictures=[[picture]])
    swept = [*range(20, 30)]  # six patches, then text
    r = result(layer=[str(i) for i in range(9)], position=[str(p) for p in swept])
    figure = cl.viz.patch_heatmap(r, inputs, tokens=[f"$t{i}" for i in range(tm.length)])
    over, (grid, foot) = figure.axes[:6], figure.axes[6:8]
    assert [ax.get_title(loc="left") for ax in over] == [f"layer {i}" for i in (0, 2, 3, 5, 6, 8)]
    assert np.allclose(np.asarray(grid.collections[0].get_array()).reshape(9, 10), r.effect.mean(0))
    assert len(foot.images) == 6 and [t.get_text() for t in foot.get_xticklabels()] == [
        f"$t{i}" for i in swept[6:]
    ]
    x, y = over[0].patches[0].get_xy()
    assert (0, x, y) == tm.cell(20)[:3] and len(over[0].patches) == 6
    assert figure.axes[8].get_ylabel() == "effect: logit difference"
    assert len(cl.viz.patch_heatmap(r).axes) == 2  # without inputs: the grid and its scale
    alone = cl.viz.patch_heatmap(result(position=[str(p) for p in swept]), inputs)
    assert [t.get_text() for t in alone.axes[2].get_xticklabels()] == ["26", "27", "28", "29"]


def test_patch_heatmap_refuses_what_it_cannot_draw():
    with pytest.raises(cl.CorelensError, match="3 axes"):
        cl.viz.patch_heatmap(result(layer=["0"], head=["0"], position=["0"]))
    with pytest.raises(cl.CorelensError, match="what='mean'"):
        cl.viz.patch_heatmap(result(layer=["0"]), what="mean")


# --- the logit lens


def test_the_last_layer_of_the_lens_is_what_the_model_predicts_there(model, samples):
    lens = cl.viz.logit_lens(model, samples[0], k=3)
    inputs = model.prepare(samples[0])
    logits, cache = model.run_with_cache(inputs, names_filter="blocks.2.hook_resid_post")
    visual = inputs.token_maps[0].visual.tolist()
    assert (
        lens.positions == visual
        and lens.layers == list(range(model.cfg.n_layers))
        and lens.ids.shape == (8, len(visual), 3)
    )
    best = logits[0, visual].softmax(-1).topk(3)
    assert (lens.ids[-1] == best.indices.numpy()).all()
    assert np.allclose(lens.probabilities[-1], best.values.detach().numpy(), atol=1e-5)
    by_hand = model.unembed(
        model.ln_final(cache["blocks.2.hook_resid_post"][0, visual[7]])
    ).softmax(-1)
    assert np.allclose(lens.probabilities[2, 7], by_hand.topk(3).values.detach().numpy(), atol=1e-5)
    assert lens.top(visual[7], 2)[0][0] == model.tokenizer.decode([int(by_hand.argmax())])
    figure = lens.plot([0, 7])
    panel = figure.axes[1]
    assert panel.get_title(loc="left") == "layer 7" and len(panel.patches) == len(
        panel.texts
    ) == len(visual)
    with pytest.raises(cl.CorelensError, match="layer 9"):
        lens.top(visual[0], 9)
    with pytest.raises(cl.CorelensError, match="layers=\\[8\\]"):
        cl.viz.logit_lens(model, samples[0], layers=[8])


def test_layers_are_taken_evenly_with_the_last():
    assert (
        evenly(range(8), 4) == [0, 2, 5, 7]
        and evenly([3], 4) == [3]
        and evenly(range(30), 1) == [29]
    )


# --- attention between tokens


def test_a_token_view_sums_a_pictures_patches(model, samples):
    heads, inputs = cl.HeadSet(["L5H6", "L1H5", "L1H2"]), model.prepare(samples[0])
    tm = inputs.token_maps[0]
    names, mass = segment_attention(model, inputs, heads, rows="all")
    _, cache = model.run_with_cache(
        inputs, names_filter=lambda name: name.endswith("attn.hook_pattern")
    )
    pattern = torch.stack([cache["pattern", layer][0, head] for layer, head in heads])
    rest = torch.tensor(sorted(set(tm.visual.tolist()) - set(tm.region.tolist())))
    line, region, other = (
        names.index(name) for name in (" digit", "[image 0: region]", "[image 0: rest]")
    )
    position = model.to_str_tokens(inputs).index(" digit")
    assert torch.allclose(mass[:, line, region], pattern[:, position, tm.region].sum(-1), atol=1e-5)
    assert torch.allclose(
        mass[:, region, other], pattern[:, tm.region][..., rest].sum(-1).mean(-1), atol=1e-5
    )
    assert torch.allclose(mass.sum(-1), torch.ones(3, len(names)), atol=1e-5)
    _, text = segment_attention(model, inputs, heads)
    assert torch.allclose(text[:, line], mass[:, line], atol=1e-6) and not text[:, region].any()
    with pytest.raises(cl.CorelensError, match="0 heads"):
        cl.viz.token_view(model, samples[0], [])


def test_a_videos_frames_are_segments(model):
    video = cl.synthetic("video", 1, seed=1)[0]
    names, mass = segment_attention(model, model.prepare(video), cl.HeadSet("L1H5"), rows="last")
    assert [name for name in names if name.startswith("[frames")] == [
        "[frames 0–1: rest]", "[frames 2–3: rest]", "[frames 2–3: region]", "[frames 4–5: rest]"
    ]  # fmt: skip
    assert float(mass[0, -1].sum()) == pytest.approx(1, abs=1e-5)


def test_what_stands_between_a_pictures_rows_is_a_segment_too():
    from dataclasses import replace

    tm = token_map([cl.Box(1, 1, 15, 15)])
    tm = replace(tm, placeholder=torch.cat([tm.visual, torch.tensor([26, 27])]))
    segments_ = segments(tm, [f"t{i}" for i in range(tm.length)])
    assert ("[image separators]", [26, 27]) in segments_ and ("[image 0: region]", [2]) in segments_
    assert sorted(position for _, of in segments_ for position in of) == list(range(tm.length))


# --- one head


def test_a_head_profile_agrees_with_scores_and_evaluations(model, samples, tmp_path):
    head_scores = cl.score_heads(model, samples, ["ram[rows=last]", "visual_mass[rows=last]"])
    profile = cl.evaluation.head_profile(
        model, samples, head_scores, "L5H6", examples=2, batch_size=4
    )
    per_sample = head_scores["ram[rows=last]"].per_sample[:, 5, 6]
    assert np.allclose(profile.masses["region"], per_sample, atol=1e-5)
    assert np.allclose(sum(profile.masses.values()), 1, atol=1e-5)
    both = profile.masses["region"] + profile.masses["rest of the picture"]
    assert np.allclose(both, head_scores["visual_mass[rows=last]"].per_sample[:, 5, 6], atol=1e-5)
    assert (
        profile.order == np.argsort(-per_sample, kind="stable").tolist() and len(profile.looks) == 4
    )
    assert (
        profile.rank("ram[rows=last]")
        == list(head_scores["ram[rows=last]"].top(1.0)).index((5, 6)) + 1
    )
    cut = cl.evaluate(model, samples, hooks=cl.knockout([(5, 6)]))
    clean = cl.evaluate(model, samples)
    lost = profile.ablations["knockout"].logprob_lost.value
    assert lost == pytest.approx(clean.answer_logprob - cut.answer_logprob, abs=1e-4)
    profile.save(tmp_path / "head.html")
    page = (tmp_path / "head.html").read_text(encoding="utf-8")
    assert "<h1>Head L5H6</h1>" in page and page.count("<img") == 4 and len(page) < 1_000_000
    assert "Ablated" not in profile._repr_html_() and "<img" in profile._repr_html_()
    assert json.loads(json.dumps(profile.to_json()))["head"] == [5, 6] and "rank" in repr(profile)


def test_a_head_profile_without_answers_has_no_ablations(model, samples):
    from dataclasses import replace

    asked = [replace(sample, answer=None) for sample in samples[:2]]
    s = scores(8, 12, rows="question")
    profile = cl.evaluation.head_profile(model, asked, s, (1, 5))
    assert (
        profile.ablations == {}
        and "What it does" not in profile.page()
        and profile.meta["rows"] == "question"
    )
    with pytest.raises(cl.CorelensError, match="L8H0"):
        cl.evaluation.head_profile(model, asked, s, (8, 0))
    with pytest.raises(cl.CorelensError, match="without a region"):
        cl.evaluation.head_profile(model, [replace(asked[0], regions=[])], s, (1, 5))


# --- results show themselves


def test_every_result_shows_itself_and_escapes(samples):
    answers = [Answer(EVIL, EVIL, EVIL, i % 2 == 0, -float(i)) for i in range(6)]
    evaluation = cl.evaluation.Evaluation(answers)
    s = scores()
    heads = cl.HeadSet([(0, 1), (2, 4)])
    picture = Image.new("RGB", SIZE, "grey")
    sample = cl.Sample([picture], EVIL, EVIL, [cl.Box(1, 1, 20, 20)], choices=[EVIL], id=EVIL)
    inputs = cl.inputs.Inputs({}, [token_map()], [sample], [[picture]])
    for shown in (
        evaluation,
        s,
        heads,
        sample,
        inputs,
        samples[0],
        result(layer=["0", "1"]),
        cl.head_grid(s),
    ):
        markup = shown._repr_html_()
        assert len(markup) > 80 and "alert(1)<" not in markup and EVIL not in markup
    for drawn in (evaluation, s, heads, sample, inputs):
        assert drawn.plot().axes
    marks = heads.plot(3, 5).axes[0]
    assert [t.get_text() for t in marks.texts] == ["1", "2"] and marks.get_title(
        loc="left"
    ).startswith("2 of 15 heads")
    bars = evaluation.plot().axes[0]
    assert [t.get_text() for t in bars.get_legend().get_texts()] == ["right (3)", "wrong (3)"]
    assert "first 3 of 3 wrong" in evaluation._repr_html_()


NO_RESULTS = {
    "HookedMLLM",
    "BoundModel",
    "Layout",
    "Metric",
    "LogitMetric",
    "Record",
    "RecordRAM",
    "View",
    "Difference",
}


def test_whatever_a_public_function_finds_shows_itself():
    """Every class of ours that one of them returns, alone or in a list, has a picture and a form
    for notebooks."""
    from corelens.findings.result import Study

    def classes(annotation):
        if annotation in ("Study", "HookedMLLM"):
            return {Study if annotation == "Study" else cl.HookedMLLM}
        inside = [class_ for part in get_args(annotation) for class_ in classes(part)]
        return {
            *inside,
            *([annotation] if getattr(annotation, "__module__", "").startswith("corelens") else []),
        }

    public = [getattr(room, name) for room in (cl, cl.evaluation, cl.viz) for name in room.__all__]
    functions = [value for value in public if inspect.isfunction(value)]
    results = {
        result
        for function in functions
        for result in classes(inspect.signature(function).return_annotation)
    }
    assert {
        cl.evaluation.Evaluation,
        cl.HeadScores,
        cl.interventions.PatchResult,
        SparseContrast,
        Study,
    } <= results and len(results) > 15
    for result in (results | {cl.HeadSet, cl.inputs.Inputs, cl.evaluation.SpeedReport}) - {
        x for x in results if x.__name__ in NO_RESULTS
    }:
        assert callable(result.plot) and callable(result._repr_html_), result


def test_a_contrast_shows_itself_and_draws_lines_that_agree_side_by_side(samples):
    right = np.ones(4)
    points = [
        ContrastPoint(line, 0.05, x, right, -right, [1.0], [[[0, 1]]])
        for x in (8, 32)
        for line in ("top", "bottom", "random")
    ]
    answers = [Answer(EVIL, "1", "1", True, -1.0)] * 4
    contrast = SparseContrast("pattern", cl.evaluation.Evaluation(answers), points)
    markup = contrast._repr_html_()
    assert markup.count("<tr") == 7 and "<img" in markup and EVIL not in markup
    assert repr(contrast).startswith(
        "SparseContrast(pattern: top, bottom, random; 4 samples, dense accuracy 1.000"
    )
    ends = [
        line.get_xdata()
        for line in contrast.plot().axes[0].get_lines()
        if len(line.get_xdata()) == 2 and line.get_label()[0] != "_"
    ]
    assert len({round(float(x[0]), 6) for x in ends}) == 3 and all(
        7 < x[0] < 9 and 28 < x[1] < 36 for x in ends
    )


def test_grids_of_two_scales_on_one_page_keep_their_colours():
    first, two = scores(), cl.HeadScores(np.array([[-1.0, 1.0]], dtype=np.float32))
    rules = [
        set(re.findall(r"\.(cl-\w+) \.c0\{fill:(.*?)\}", x._repr_html_())) for x in (first, two)
    ]
    assert [[name for name, _ in rule] for rule in rules] == [["cl-one"], ["cl-two"]] and rules[
        0
    ] != rules[1]
    assert "light-dark(" in str(rules) and "prefers-color-scheme" not in first._repr_html_()


def test_only_a_figure_of_its_own_has_an_interactive_twin(tmp_path):
    s = scores()
    figure = cl.head_grid(s, s.top(k=1))
    assert "data-tips" in figure._repr_html_()
    figure.save_html(tmp_path / "grid.html")
    assert (tmp_path / "grid.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    shared = cl.viz.sorted_scores(s)
    cl.head_grid(s, ax=shared.axes[0])
    assert shared._repr_html_() is None
    with pytest.raises(cl.CorelensError, match="without an interactive twin"):
        shared.save_html(tmp_path / "sorted.html")


def test_a_photograph_is_drawn_no_finer_than_a_page_needs():
    heat = np.zeros((1300, 2000))
    heat[:650, :1000] = 1
    lit = np.asarray(
        attention_image(
            Image.new("RGB", (2000, 1300), "grey"), heat, [cl.Box(1000, 650, 1990, 1290)]
        )
    )
    assert lit.shape == (650, 1000, 3) and np.ptp(lit[300, 480]) > 50 > 5 > np.ptp(lit[300, 520])
    assert (lit[325:, 500:] == 255).all(-1).any() and not (lit[:320] == 255).all(-1).any()


def test_pictures_for_a_page_are_those_of_the_overlay():
    region = cl.Box(33, 17, 47, 31)
    tm = token_map([region])
    pattern = torch.zeros(1, 2, 3, tm.length)
    pattern[..., tm.region[0]] = 0.5
    sample = SimpleNamespace(
        images=[Image.new("RGB", SIZE, "grey")], regions=[region], video=None, question="q"
    )
    made = head_pictures(FakeModel(tm, pattern), sample, ["L1H0"])
    assert [words for _, words in made] == ["the picture", made[1][1]]
    assert made[1][1].startswith("**L1H0** from ‘t") and made[1][1].endswith(
        "region 0.50, picture 0.50, peak 0.5"
    )


# --- what a newcomer types


def test_one_sample_one_picture_and_one_region_need_no_list(model, samples):
    """Found by trying the README as a newcomer would: each of these ended in a TypeError."""
    sample_ = samples[0]
    alone = cl.Sample(
        images=sample_.images[0],
        question=sample_.question,
        answer=sample_.answer,
        regions=sample_.regions[0],
    )
    assert alone.images == sample_.images and alone.regions == sample_.regions
    assert len(cl.Sample(images=np.zeros((8, 8, 3), np.uint8)).images) == 1 and cl.Sample(
        images="a.png"
    ).images == ["a.png"]
    assert np.allclose(
        cl.score_heads(model, alone)["ram"].values, cl.score_heads(model, [sample_])["ram"].values
    )
    right = cl.evaluate(model, [sample_]).accuracy
    assert (
        cl.evaluate(model, alone).accuracy
        == cl.evaluate(model, model.prepare(sample_, answer=True)).accuracy
        == right
    )
    text = repr(model.prepare(sample_))
    assert text.startswith("Inputs(1 row of ") and "input_ids" in text and len(text) < 200
    with pytest.raises(cl.CorelensError, match="L9H1: heads of another model"):
        cl.overlay(model, sample_, ["L9H1"])
    with pytest.raises(cl.CorelensError, match="from_pretrained"):
        cl.HookedMLLM("somebody/some-model")


# --- corelens show


def test_show_answers_and_writes_where_heads_look(samples, tmp_path):
    from corelens.cli.app import app

    sample = samples[0]
    sample.images[0].save(tmp_path / "mine.png")
    box = ",".join(str(edge) for edge in sample.regions[0].bounds)
    start = ["show", str(tmp_path / "mine.png"), sample.question]
    run = CliRunner().invoke(
        app, [*start, "--box", box, "--top", "2", "--json", "--out", str(tmp_path / "a/show.html")]
    )
    printed = json.loads(run.stdout.splitlines()[-1])
    assert (
        printed["answer"] == sample.answer
        and 0.5 < printed["probability"] <= 1
        and len(printed["heads"]) == 2
    )
    assert (
        min(printed["heads"].values()) > 0.3
        and printed["ranked_by"] == "top by ram[rows=last] over this picture alone"
    )
    page = (tmp_path / "a/show.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 and f"The model says: {sample.answer} (" in page
    run = CliRunner().invoke(
        app, [*start, "--heads", "L1H5,L5H6", "--out", str(tmp_path / "show.png")]
    )
    assert run.exit_code == 0 and "heads, as given: L1H5, L5H6" in run.stdout
    assert Image.open(tmp_path / "show.png").width > 300
    run = CliRunner().invoke(app, [*start, "--json", "--out", str(tmp_path / "show.html")])
    assert (
        json.loads(run.stdout.splitlines()[-1])["ranked_by"]
        == "top by ram[rows=last] over 40 scenes of 'refer'"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--box", "1,2,3"], "four numbers"), (["--heads", "L99H1"], "heads of another model"), (["--out", "a.gif"], ".html")],
)  # fmt: skip
def test_show_says_what_is_wrong(samples, tmp_path, options, said):
    from corelens.cli.app import app

    samples[0].images[0].save(tmp_path / "mine.png")
    run = CliRunner().invoke(app, ["show", str(tmp_path / "mine.png"), "What?", *options])
    assert isinstance(run.exception, cl.CorelensError) and said in str(run.exception)
    run = CliRunner().invoke(app, ["show", str(tmp_path / "nothing.png"), "What?"])
    assert isinstance(run.exception, cl.CorelensError) and "nothing.png" in str(run.exception)
