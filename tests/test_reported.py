"""Studies side by side; and the numbers in the README and in docs/findings.md are those of the committed reports."""

import json
from pathlib import Path

import pytest

import corelens as cl
from corelens.findings.compare import APART, CONTINUED, FORMAT, SEED, compare
from corelens.findings.options import selection_name

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs/study"
QUESTION, MEAN, LAST = "RAM (question rows, max)", "RAM (question rows, mean)", "RAM (last row)"
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/findings.md", "docs/index.md")}
KINDS = ("zero", "mean", "uniform", "knockout")
SEEDS = ("qwen3vl-s-seed1", "qwen3vl-s-seed2")
SIZES, WORLDS = ("qwen3vl-s-all", "qwen3vl-m", "qwen3vl-l"), ("refer-hard", "doc", "video")


@pytest.fixture(scope="module")
def reports():
    return compare(STUDIES).reports


def cell(x) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(x.values() if isinstance(x, dict) else x))


def said(words: str, *names: str) -> None:
    """Line breaks and bold do not count."""
    for name in names or ("README.md", "docs/findings.md"):
        text = " ".join(TEXTS[name].replace("**", "").split())
        assert " ".join(words.split()) in text, f"{name} does not say: {words}"


def line(numbers, role, ranking=""):
    return next(one["ablations"] for one in numbers["table"] if (one["role"], one["ranking"]) == (role, ranking))


def lost(numbers, role, ranking="") -> str:
    drop = line(numbers, role, ranking)["knockout"]["drop"]
    return "{} [{}, {}]".format(*(round(100 * x) for x in drop.values()))


def found(report, id):
    return next(one for one in report["findings"] if one["id"] == id)


def test_the_comparison_is_that_of_the_reports_beside_it():
    told = json.loads((STUDIES / "zoo.json").read_text(encoding="utf-8"))
    assert told["format"] == FORMAT and told == json.loads(json.dumps(compare(STUDIES).to_json()))


def test_the_table_of_findings(reports):
    short = {QUESTION: "question rows", MEAN: "their mean", LAST: "last row"}
    verdicts = {"reproduced": "yes", "not reproduced": "no", "not judged": "–"}
    for each in next(iter(reports.values()))["findings"]:
        cells = []
        for report in reports.values():
            mine = found(report, each["id"])
            scope = mine["scope"].split(";")[0]  # "by … only in …": by no reading in all worlds
            held = [words for name, words in short.items() if name in scope and "only in" not in scope]
            cells.append(verdicts[mine["verdict"]] + (f" ({', '.join(held)})" if held else ""))
        said(f"| {each['id']} {each['title']} | {' | '.join(cells)} |")
    said(f"| finding | {' | '.join(f'`{name}`' for name in reports)} |")


def test_the_table_of_ablations(reports):
    numbers = reports["qwen3vl-s"]["worlds"]["refer"]
    chosen = [("top", QUESTION), ("top", MEAN), ("top", LAST), ("bottom", QUESTION), ("bottom", LAST), ("random", ""),
              ("layer-matched", QUESTION), ("layer-matched", LAST)]  # fmt: skip
    for role, ranking in chosen:
        cells = [cell(line(numbers, role, ranking)[kind]["accuracy"]) for kind in KINDS]
        said(f"| {selection_name(role, ranking)} | {' | '.join(cells)} |")
    said(f"Heads were scored on {numbers['scored']} scenes and tested on {numbers['evaluated']} others")
    said(f"| none | {cell(numbers['clean'])} | | | |")
    for rows, words in (("question", "the question's tokens"), ("last+answer", "the last row")):
        said(f"| {words} | {cell(numbers['readers'][rows]['accuracy'])} |", "docs/findings.md")
    cut = numbers["readers"]
    said(
        f"Cut the evidence from the question's tokens in all 96 heads: accuracy {cell(cut['question']['accuracy'])}, "
        f"nothing is lost. Cut it from the last row: {cell(cut['last+answer']['accuracy'])}.", "README.md",
    )  # fmt: skip
    drop = {kind: round(100 * line(numbers, "top", LAST)[kind]["drop"]["value"]) for kind in KINDS}
    said(f"cost {drop['zero']} points (zero), {drop['mean']} (mean), {drop['uniform']} (uniform) and {drop['knockout']} "
         "(knockout)", "README.md")  # fmt: skip
    said(f"On {numbers['evaluated']} scenes the five heads cost {drop['knockout']} points of accuracy", "docs/index.md")
    bottom = [round(100 * line(numbers, "bottom", LAST)[kind]["drop"]["value"]) for kind in KINDS[:3]]
    said(f"{min(bottom)} to {max(bottom)} points without their output")
    top, random = (line(numbers, *of)["knockout"]["accuracy"]["value"] for of in (("top", LAST), ("random", "")))
    said(f"{top:.3f} means something beside {random:.3f}", "docs/findings.md")


def test_what_changes_with_the_size(reports):
    """The table of the three decoders behind one tower, in findings.md; each cell lists pictures, documents, videos."""
    rows = {
        "layers × heads, in the top 5%": lambda r, w: f"{r['n_layers']} × {r['n_heads']}, {line(w[0], 'random')['knockout']['k']}",
        "accuracy": lambda r, w: "; ".join(f"{one['clean']['value']:.2f}" for one in w),
        "lost without the top by last-row RAM": lambda r, w: "; ".join(lost(one, "top", LAST) for one in w),
        "without the top by question-row RAM (max)": lambda r, w: "; ".join(lost(one, "top", QUESTION) for one in w),
        "without as many random heads": lambda r, w: "; ".join(lost(one, "random") for one in w),
        "regained by the top by last-row RAM alone": lambda r, w: "; ".join(
            f"{one['sufficiency']['lines'][f'top, {LAST}'][0]['regained'][0]:.0%}" for one in w),
        "mean relative depth of the top": lambda r, w: "; ".join(f"{one['layers'][LAST]['depth'][0]:.2f}" for one in w),
        "ρ between worlds, last row": lambda r, w: "{:.2f} to {:.2f}".format(*sorted(
            pair["spearman"] for pair in found(r, "F2")["numbers"]["pairs"] if pair["ranking"] == LAST)[::2]),
    }  # fmt: skip
    for words, of in rows.items():
        cells = [of(reports[name], [reports[name]["worlds"][world] for world in WORLDS]) for name in SIZES]
        said(f"| {words} | {' | '.join(cells)} |", "docs/findings.md")
    every = [reports[name]["worlds"][world] for name in SIZES for world in WORLDS]

    def top(name, world, ranking=LAST):
        return {tuple(head) for head in line(reports[name]["worlds"][world], "top", ranking)["knockout"]["heads"][0]}

    pictures, pages, videos = (top("qwen3vl-l", world) for world in WORLDS)
    said(f"of the {len(pictures)} in `qwen3vl-l` {len(pictures & videos)} are the same in pictures and videos and "
         f"{len(pictures & pages)} in documents", "docs/findings.md")  # fmt: skip
    shared = [len(top("qwen3vl-s-all", world) & top("qwen3vl-s-all", world, QUESTION)) for world in WORLDS]
    assert shared[:2] == [2, 2]  # "two in pictures", "two of five in documents"
    shared = [len(top("qwen3vl-m", world) & top("qwen3vl-m", world, QUESTION)) for world in WORLDS]
    assert shared == [len(top("qwen3vl-m", WORLDS[0])), 2, 6]  # "all seven in pictures, two in documents …"
    alone = [reports[name]["worlds"]["doc"]["sufficiency"]["lines"][f"top, {LAST}"][0]["regained"][0] for name in SIZES]
    said(f"which bring back {min(alone):.0%} to {max(alone):.0%} (F6)", "docs/findings.md")
    by_question = [
        reports[name]["worlds"]["doc"]["sufficiency"]["lines"][f"top, {QUESTION}"][0]["regained"][0]
        for name in ("qwen3vl-m", "qwen3vl-l")
    ]
    said(f"those by question rows bring back {by_question[0]:.0%} and {by_question[1]:.0%} there", "docs/findings.md")
    assert round(100 * max(one["readers"]["question"]["drop"]["value"] for one in every)) == 3  # "at most 3 points"

    def windowed(name, world, which, at=slice(None)):
        parts = reports[name]["worlds"][world]["hybrid"]["lost"][LAST][at]
        return [round(100 * part[which]["value"]) for part in parts]

    wide = slice(1, None)
    largest, others = windowed("qwen3vl-l", "refer-hard", "top", wide), ("qwen3vl-s-all", "qwen3vl-m")
    left = sorted(x for name in others for x in windowed(name, "refer-hard", "top", wide))
    random = sorted(x for name in SIZES for x in windowed(name, "refer-hard", "random", wide))
    said(f"`qwen3vl-l` loses {max(largest)} points of `refer-hard`, the others {left[0]} to {left[-1]} (as many random "
         f"heads full: {random[0]} to {random[-1]})", "docs/findings.md")  # fmt: skip
    middle, video = (sorted(windowed(name, "video", "top")) for name in ("qwen3vl-m", "qwen3vl-l"))
    said(f"`qwen3vl-s-all` loses none, `qwen3vl-m` {middle[0]} to {middle[-1]} and `qwen3vl-l` {video[0]} to "
         f"{video[-1]}", "docs/findings.md")  # fmt: skip
    assert max(windowed("qwen3vl-s-all", "video", "top")) <= 0
    sits = [{layer for world in WORLDS for layer, _ in top(name, world)} for name in SIZES]
    said("layers {} to {} of 8, {} to {} of 12 and {} to {} of 16".format(*(f(one) for one in sits for f in (min, max))),
         "docs/findings.md")  # fmt: skip

    def cost(*of):
        drops = [round(100 * line(one, *of)["knockout"]["drop"]["value"]) for one in every]
        return f"{min(drops)} to {max(drops)}"

    said(f"cost {cost('top', LAST)} points when the evidence is knocked out of their sight, those by question rows, the "
         f"default, {cost('top', QUESTION)}, and as many random heads none", "README.md")  # fmt: skip
    assert cost("random", "") == "0 to 0"
    scored, tested = (sorted(one[key] for one in every) for key in ("scored", "evaluated"))
    said(f"the three sizes on {scored[0]} to {scored[-1]} and tested on {tested[0]} to {tested[-1]} of each world")


def test_what_changes_with_the_length(reports):
    short, long = (reports["qwen3vl-s-long"]["worlds"][name] for name in ("refer", "refer:sides=[960,1024],objects=24"))
    of = {name: one["concentration"][LAST] for name, one in (("short", short), ("long", long))}
    share = {name: f"{one['share_of_top'][0]:.0%}" for name, one in of.items()}
    said(f"On prompts of {long['hybrid']['tokens']} tokens the top 5% by last-row RAM hold {share['long']} of the summed "
         f"RAM (Gini {of['long']['gini'][0]:.2f}), on {short['hybrid']['tokens']} tokens {share['short']} "
         f"({of['short']['gini'][0]:.2f})")  # fmt: skip
    parity = long["hybrid"]["lost"][LAST][0]
    said(f"the others in a window of {parity['window']}: {100 * parity['top']['value']:.0f} points lost, "
         f"{100 * parity['random']['value']:.0f} with random heads full", "docs/findings.md")  # fmt: skip
    chance = [one["localisation"][LAST]["chance"] for one in (short, long)]
    said(f"the evidence is {chance[0]:.1%} of the visual tokens and not {chance[1]:.1%}", "docs/findings.md")
    said(f"`qwen3vl-s-long` on {short['scored']} scenes and tested on {short['evaluated']} of each world")
    assert (short["scored"], short["evaluated"]) == (long["scored"], long["evaluated"])


def test_what_changes_with_the_seed(reports):
    worlds = [reports[name]["worlds"] for name in SEEDS]
    pictures, captions = ([one[world] for one in worlds] for world in ("refer", "captions"))
    several = [*pictures, *captions, *reports["internvl-s"]["worlds"].values()]
    assert {(one["scored"], one["evaluated"]) for one in several} == {(96, 144)}
    said("`internvl-s` and the two seeds on 96 scenes and tested on 144 of each world")

    right = " and ".join(f"{one['clean']['value']:.3f}" for one in pictures)
    said(f"They answer {right} and read the evidence at the last row too", "docs/findings.md")
    for one in pictures:  # "cut there they lose all, cut from the question's tokens nothing"
        cut = {rows: one["readers"][rows]["drop"]["value"] for rows in ("question", "last+answer")}
        assert cut == {"question": 0, "last+answer": one["clean"]["value"]}
    (first, second), random = (lost(one, "top", LAST) for one in pictures), [lost(one, "random") for one in pictures]
    said(f"seed 1 loses {first} points and seed 2 {second}, without five random ones {' and '.join(random)}",
         "docs/findings.md")  # fmt: skip
    said(
        f"their top five cost {first} and {second} points where five random ones cost {' and '.join(random)}",
        "README.md",
    )
    right = " and ".join(f"{one['clean']['value']:.3f}" for one in captions)
    top, random = (" and ".join(lost(one, *of) for one in captions) for of in (("top", LAST), ("random", "")))
    said(f"captions ({right} answered) the five cost {top} and random ones {random}", "docs/findings.md")
    verdicts = [{id: found(reports[name], id)["scope"] for id in ("F4", "F5", "F6", "F7")} for name in SEEDS]
    assert [[id for id, scope in one.items() if scope == "met in refer; not in captions"] for one in verdicts] == [
        ["F4", "F5", "F7"], ["F4", "F5", "F6", "F7"]
    ]  # "The seeds' F4, F5 and F7, and the second's F6"  # fmt: skip

    between = {tuple(one["models"]): one for one in compare(STUDIES).between_models()
               if one["reading"] == LAST and one["world"] == "refer"}  # fmt: skip
    seeds = [one for one in between.values() if one["relation"] == SEED]
    assert len(seeds) == 3
    for measure, words in (
        ("spearman", "rank correlations of {:.2f} to {:.2f} only"),
        ("layers", "r = {:.2f} to {:.2f}"),
    ):
        values = sorted(one[measure] for one in seeds)
        said(words.format(values[0], values[-1]), "docs/findings.md")
    more = between["qwen3vl-s", "qwen3vl-s-long"]
    assert more["relation"] == CONTINUED
    said(f"the rank correlation is {more['spearman']:.2f}", "docs/findings.md")


def test_what_changes_with_the_family(reports):
    fewest = {"internvl-s": (0.05, "those five"), "llava-ov-s": (0.02, "two of them")}
    for name, (fraction, words) in fewest.items():
        (numbers,) = reports[name]["worlds"].values()
        top, random = lost(numbers, "top", LAST), lost(numbers, "random")
        said(f"its top five by last-row RAM cost {top} points, five random heads {random}")
        back = numbers["sufficiency"]["lines"][f"top, {LAST}"][0]
        assert back["fraction"] == fraction
        heads = " and ".join(f"L{layer}H{head}" for layer, head in back["heads"][0])
        seen = f"({heads}) " if fraction < 0.05 else ""
        said(f"with only {words} seeing the picture {seen}{back['regained'][0]:.0%} of what blindness costs comes back",
             "docs/findings.md")  # fmt: skip
    numbers = reports["llava-ov-s"]["worlds"]["refer:sides=[256,256]"]
    said(f"`llava-ov-s` on {numbers['scored']} scenes and tested on {numbers['evaluated']}")
    assert numbers["layers"][LAST]["top"][1:3] == [2, 3]  # "in layers 1 and 2"
    (numbers,) = reports["internvl-s"]["worlds"].values()
    assert numbers["layers"][LAST]["top"][1] == 5  # "all five are in layer 1"


def test_they_are_small():
    size = sum(path.stat().st_size for path in STUDIES.rglob("*") if path.is_file())
    assert size < 11e6


def test_models_are_compared_from_their_reports_alone(tmp_path):
    report = json.loads((STUDIES / "qwen3vl-s/report.json").read_text(encoding="utf-8"))
    (about,) = report["models"].values()
    lineage = {"first": ("base", []), "second": ("more", ["first"]), "third": ("base", [])}
    for name, (trained, start) in lineage.items():
        (tmp_path / name).mkdir()
        about["training"] = {"name": trained, "starts": start, "seed": 0, "parameters": 10}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    found = compare(tmp_path)
    pairs = {tuple(one["models"]): one for one in found.between_models()}
    assert {pair: one["relation"] for pair, one in pairs.items()} == {
        ("first", "second"): CONTINUED, ("first", "third"): SEED, ("second", "third"): APART,
    }  # fmt: skip
    assert all(one["spearman"] == pytest.approx(1) and one["jaccard"] == 1 for one in pairs.values())
    page = found.write(tmp_path).read_text()
    assert page.count('class="verdict') == 3 * 8 and 'href="second/report.html"' in page
    told = json.loads((tmp_path / "zoo.json").read_text())
    assert told["verdicts"]["F5"]["third"]["verdict"] == "reproduced"
    row = next(one for one in told["numbers"]["F5"] if (one["model"], one["reading"]) == ("first", LAST))
    assert row["top, knockout"] == line(report["worlds"]["refer"], "top", LAST)["knockout"]["drop"]
    report["format"] = "corelens-study/1"
    (tmp_path / "third" / "report.json").write_text(json.dumps(report))
    with pytest.raises(cl.CorelensError, match="third"):
        compare(tmp_path)
    with pytest.raises(cl.CorelensError, match="no studies"):
        compare(tmp_path / "first")
