"""What the pages say of the committed study, of benchmarks/results/masked_heads.json and of the
models' cards: what holds in how many models, and what masking whole heads costs.
docs/_build/tables.py writes it into pages."""

import json
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from cards import card, scenes
from markdown_tables import interval, listed, markdown, paragraph

from corelens.findings.f3_layers import slope_over_sizes
from corelens.heads.intervals import percent_interval
from corelens.heads.stats import spearman

ROOT = Path(__file__).parents[2]
HOPS = ("qwen3vl-hop-s", "qwen3vl-hop", "qwen3vl-hop-l")
MADE_TO_READ = ("qwen3vl-qs", "qwen3vl-qs-control", "qwen3vl-q", "internvl-q", *HOPS)
ROLES, ENDS = ("top", "bottom", "random"), ("value", "low", "high")
WORDS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen",
)  # fmt: skip


def runs() -> dict[str, Any]:
    """{model: its run of the benchmark}."""
    path = ROOT / "benchmarks/results/masked_heads.json"
    return json.loads(path.read_text(encoding="utf-8"))["models"]


@lru_cache
def report() -> dict[str, Any]:
    """The committed study."""
    return json.loads((ROOT / "docs/study/report.json").read_text(encoding="utf-8"))


def study(model: str) -> dict[str, Any]:
    """A model's part of the committed study."""
    return report()["models"][model]


def masked() -> str:
    """Accuracy without the top, the bottom and random heads, a column a model."""
    columns = []
    for name, run in runs().items():
        draws = sorted(draw["accuracy"] for draw in run["random"])
        middle = ", ".join(f"{draws[i]:.3f}" for i in (0, len(draws) // 2, -1))
        alone = [
            f"{', '.join(_names(x['heads']))} (rank {x['rank']}): {interval(x)}"
            for x in run.get("alone", [])
        ]
        size = f"{len(run['top']['heads'])} of {run['total']}"
        columns.append([
            f"`{name}`", f"{run['scored']} scenes, {run['tested']} others", size,
            interval(run["clean"]), interval(run["top"]), interval(run["bottom"]), middle,
            f"{len(draws)}", "; ".join(alone) or "–",
        ])  # fmt: skip
    labels = [
        "", "ranked on, tested on", "heads masked", "accuracy: none masked", "top 5% by RAM",
        "bottom 5%", "random: lowest, median, highest", "random sets", "one head alone",
    ]  # fmt: skip
    return markdown([[label, *cells] for label, *cells in zip(labels, *columns, strict=True)])


def masked_question() -> str:
    """Every run in which whole heads of qwen3vl-q were masked."""
    name, run = "qwen3vl-q", runs()["qwen3vl-q"]
    part = study(name)["worlds"]["refer"]
    by_study = part["numbers"]["F5"]
    right = part["clean"]["value"]
    random = [right * (1 - lost) for lost in by_study["random"]["zero"]]
    top, bottom = (by_study["ram"][role]["zero"]["accuracy"] for role in ("top", "bottom"))
    rows = [["ranked on", "tested on", "clean", "top 5% masked", "bottom 5%", "random sets"]]
    scored = f"{part['scored']} scenes ([the study](findings.md))"
    rows.append([scored, f"{part['tested']} others", *_accuracies(right, top, bottom, random)])
    rows.append(_of_benchmark(run))
    rows += [_of_card(x) for x in card(name)["zeroed"] if x["rows"] == "question"]
    return markdown(rows)


def masked_language() -> str:
    """Every run in which whole heads of smol-vlm were masked, ranked by published RAM."""
    rows = [["ranked on", "tested on", "clean", "top 5% masked", "bottom 5%", "random sets"]]
    rows.append(_of_benchmark(runs()["smol-vlm"]))
    rows += [_of_card(x) for x in card("smol-vlm")["zeroed"] if x["rows"] == "question"]
    return markdown(rows)


def language() -> str:
    """What the README says of smol-vlm."""
    run = runs()["smol-vlm"]
    clean, top, bottom = (f"{run[name]['accuracy']:.2f}" for name in ("clean", "top", "bottom"))
    text = "`smol-vlm` (extra `smol`) has a pretrained language decoder. Masking its top 5% takes "
    text += f"{clean} to {top}, and the bottom 5% leave {bottom} ({run['tested']} scenes). "
    text += f"{_random_sets(run, shared=False)} "
    few = next(x for x in card("smol-vlm")["zeroed"] if x["options"] and x["rows"] == "question")
    text += f"On scenes of {_word(few['options']['objects'])} object it takes {few['clean']:.2f} "
    text += f"to {few['zeroed']['top']:.2f}. More: [worlds](docs/worlds.md)."
    return paragraph(text)


def language_more() -> str:
    """What docs/worlds.md says of smol-vlm below its table."""
    run, measured = runs()["smol-vlm"], card("smol-vlm")
    text = "With six objects, the top heads lie at a mean relative depth of "
    text += f"{run['top_depth']:.2f} (0: the first layer, 1: the last). {_random_sets(run)} "
    for x in run.get("alone", []):
        text += f"{', '.join(_names(x['heads']))} is number {x['rank']} by RAM, and leaves "
        text += f"{x['accuracy']:.2f} when it is masked alone: a head that hardly looks at the "
        text += "evidence can be needed, too. "
    cuts = [x for x in measured["reads"] if not x["options"]] or measured["reads"]
    cost, n = cuts[0]["cost"], cuts[0]["n"]
    points = {
        rows: [f"{round(100 * end)}".replace("-", "−") for end in cost[rows]]
        for rows in ("question", "last")
    }
    text += "The answer hangs on the last row here, which is not as the paper has it: cutting the "
    text += "evidence there in all heads costs {} points [{}, {}], ".format(*points["last"])
    text += "cutting it at the question's rows {} [{}, {}] ".format(*points["question"])
    text += f"({n} scenes). About half of the top heads at one are top heads at the other, too."
    return paragraph(text)


def made_to_read() -> str:
    """Of the models that were made to read at the question's rows, and of a control, by their
    cards: points lost by cutting the evidence off, and accuracy with whole heads masked."""
    rows = [["model", "scenes", "right", "cut at the question's rows", "cut at the last row",
             "top 5% masked", "bottom 5%", "random sets"]]  # fmt: skip
    for name in MADE_TO_READ:
        measured = card(name)
        masked = [x for x in measured["zeroed"] if x["rows"] == "question"]
        for reads, zeroed in zip(measured["reads"], masked, strict=True):
            assert scenes(reads) == scenes(zeroed)
            cells = _accuracies(zeroed["clean"], *(zeroed["zeroed"][x] for x in ROLES))
            cuts = [
                percent_interval(dict(zip(ENDS, reads["cost"][x], strict=True)))
                for x in ("question", "last")
            ]
            cuts = [f"{cut} (n = {reads['n']})" for cut in cuts]
            right = f"{cells[0]} of {zeroed['tested']}"
            rows.append([f"`{name}`", scenes(reads), right, *cuts, *cells[1:]])
    return markdown(rows)


def counted() -> str:
    """How many samples and random sets the committed study rests on."""
    parts = [
        (name, part)
        for name, model in report()["models"].items()
        for part in model["worlds"].values()
        if "F1" in part["numbers"]
    ]
    tested: dict[int, list[str]] = {}
    for name, part in parts:
        names = tested.setdefault(part["tested"], [])
        names += [] if f"`{name}`" in names else [f"`{name}`"]
    scored = [str(n) for n in sorted({part["scored"] for _, part in parts})]
    sets = max(len(x["numbers"]["F5"]["random"]["zero"]) for _, x in parts if "F5" in x["numbers"])
    others = ", ".join(f"{n} others of {listed(names)}" for n, names in tested.items())
    text = (
        f"{listed(scored, 'or')} scenes per world rank the heads, and others test them: {others}. "
    )
    return paragraph(f"{text}{sets} random sets stand beside the top heads where F5 masks heads.")


def as_published(part: dict[str, Any]) -> dict[str, Any]:
    """Of a model's world in the study: points lost by cutting the evidence from the question's
    tokens, by masking the top and the bottom heads by RAM as published, and by the worst random
    set; and how many of the top heads lead at the last row, too."""
    f5 = part["numbers"]["F5"]
    top, last = (
        {tuple(head) for head in f5[key]["top"]["heads"]} for key in ("ram", "ram[rows=last]")
    )
    return {
        "cut": part["row_costs"]["question"],
        "top": f5["ram"]["top"]["zero"],
        "bottom": f5["ram"]["bottom"]["zero"],
        "random": part["clean"]["value"] * max(f5["random"]["zero"]),
        "k": len(top),
        "shared": len(top & last),
    }


def published_mask() -> str:
    """In which models masking the heads that RAM as published ranks first costs more than any
    random set, and the bottom heads next to nothing."""
    in_all, in_some, elsewhere = list[str](), list[str](), list[str]()
    costly, others = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, model in report()["models"].items():
        worlds = [as_published(x) for x in model["worlds"].values() if "F5" in x["numbers"]]
        here = [x for x in worlds if x["top"]["low"] > x["random"] and x["bottom"]["value"] <= 0.05]
        costly, others = costly + here, others + [x for x in worlds if x not in here]
        if here:
            count = f"{WORDS[len(here)]} of {WORDS[len(worlds)]} worlds of "
            if len(here) < len(worlds):
                in_some.append(f"{count}`{name}`")
            else:
                in_all.append(f"`{name}`")
        if here and not model["reading"]["published"]:
            elsewhere.append(f"`{name}`")
    text = "- **Masked as published, the heads that the published score ranks first matter in "
    text += f"{listed(in_all + in_some)}**: the top 5% cost {_points(costly, 'top')} points, "
    text += f"more than every random set, and the bottom 5% {_points(costly, 'bottom')}. In "
    text += f"{listed(elsewhere)} the answer does not need what these heads fetch at the "
    text += "question's tokens: many of them fetch it at the last row, too. In all other worlds "
    text += f"the top 5% cost {_points(others, 'top')} points."
    return paragraph(text, indent="  ")


def backed_up() -> str:
    """What masking heads costs, and cutting the evidence off from them, where the two disagree."""
    masked_costs, cut = [], []
    worlds = study("qwen3vl-q-compare")["worlds"]
    for part in worlds.values():
        f5 = part["numbers"]["F5"]
        masked_costs.append(f"{100 * f5['ram']['top']['zero']['value']:.0f}")
        cut.append(f"{100 * f5['ram']['top']['knockout']['value']:.0f}")
    bottom = study("qwen3vl-s")["worlds"]["refer"]["numbers"]["F5"]["ram[rows=last]"]["bottom"]
    lost, hidden = (f"{100 * bottom[kind]['value']:.0f}" for kind in ("zero", "knockout"))
    text = "- **Masking heads and cutting the evidence off from them can disagree, both ways**: in "
    text += f"`qwen3vl-q-compare`, masking the top 5% costs {' and '.join(masked_costs)} points "
    text += f"({listed([f'`{name}`' for name in worlds])}), cutting the evidence off from the "
    text += f"same heads {' and '.join(cut)}. In `qwen3vl-s`, masking the bottom 5% costs {lost}, "
    text += f"cutting the evidence off from them {hidden}: they serve the answer otherwise."
    return paragraph(text, indent="  ")


def pages_apart() -> str:
    """How far the rankings of a model's worlds agree: of pages with others, and of the others."""
    with_pages, others, models = list[float](), list[float](), list[str]()
    for name in report()["models"]:
        values = {
            world: np.array(part["numbers"]["F2"]["values"], dtype=float)
            for world, part in study(name)["worlds"].items()
            if "F2" in part["numbers"]
        }
        if "doc" not in values:
            continue
        models.append(f"`{name}`")
        for pair in combinations(values, 2):
            rho = spearman(*(values[world] for world in pair))
            (with_pages if "doc" in pair else others).append(rho)
    ends = [f"{min(x):.2f} to {max(x):.2f}" for x in (with_pages, others)]
    text = "- **Which heads look depends on the kind of picture.** In the models that answer drawn "
    text += f"scenes, pages and videos ({listed(models)}), the ranks of all heads on pages agree "
    text += f"less with those on the rest (Spearman {ends[0]}) than these with each other "
    text += (
        f"({ends[1]}; F2). The heads of one world are needed in the others all the same, but for "
    )
    text += (
        "one pair: in `qwen3vl-m` the heads that lead on pages matter half as much on videos as "
    )
    text += "the videos' own."
    return paragraph(text, indent="  ")


def overall() -> str:
    """In how many models each finding is reproduced, of those in which it was judged: of the models
    that are judged by RAM as published, and of the others."""
    published = [name for name, x in report()["models"].items() if x["reading"]["published"]]
    others = [name for name in report()["models"] if name not in published]
    return paragraph(
        f"**Reproduced by RAM as published**, in the models that were trained to read at the "
        f"question's tokens: {_reproduced(published)}. **By RAM at the last row, a score of "
        f"ours**, in those that read there: {_reproduced(others)}."
    )


def _reproduced(models: list[str]) -> str:
    """ "F4 in five of six, F1 in none of six": the most often reproduced first."""
    counts = []
    for finding in report()["findings"]:
        words = [finding["models"][name]["word"] for name in models]
        judged = sum(word in ("reproduced", "not reproduced") for word in words)
        if judged:
            counts.append((words.count("reproduced") / judged, finding["id"], judged, words))
    counts.sort(key=lambda x: (-x[0], x[1]))
    return ", ".join(
        f"{name} in {_word(held) if (held := words.count('reproduced')) else 'none'} of "
        f"{_word(judged)}"
        for _, name, judged, words in counts
    )


def enough() -> str:
    """In how many worlds the top heads suffice alone."""
    (f6,) = (x for x in report()["findings"] if x["id"] == "F6")
    yes, no = list[str](), list[str]()
    for name, model in f6["models"].items():
        # (a model of one world has no words by world)
        words = model["worlds"] or {"": model["word"]}
        yes += [name for word in words.values() if word == "reproduced"]
        no += [name for word in words.values() if word == "not reproduced"]
    names = [f"`{name}`" for name in dict.fromkeys(yes)]
    text = f"- **The top 5% of the heads suffice alone in {len(yes)} of the {len(yes) + len(no)} "
    text += f"worlds in which that could be judged** (F6; {listed(names)}): only they see the "
    text += "picture, and 90% or more of the clean accuracy is left."
    return paragraph(text, indent="  ")


def claims() -> str:
    """The eight claims, in the study's words."""
    return markdown([["", "claim"], *([x["id"], x["claim"]] for x in report()["findings"])])


def _points(worlds: list[dict[str, Any]], heads: str) -> str:
    """ "46 to 80": the range over these worlds."""
    values = [round(100 * world[heads]["value"]) for world in worlds]
    return f"{min(values)} to {max(values)}"


def formed_by_language() -> str:
    """What the study found of smol-vlm, beside the other models."""
    verdicts = {x["id"]: x["models"] for x in report()["findings"]}
    late = [name for name, x in verdicts["F3"].items() if x["word"] == "reproduced"]
    few = [name for name, x in verdicts["F1"].items() if x["word"] == "reproduced"]
    assert late == ["smol-vlm"] and "smol-vlm" in few, "the text below says so"
    text = "- **In `smol-vlm`, whose decoder learned from text, the top heads lie late** (F3): the "
    text += "only model of which that holds in every world. It is one model, judged on scenes of "
    text += "one and two objects (of six it answers too few). They are "
    text += "few (F1, as in "
    text += f"{_word(len(few) - 1)} other models)"
    worlds = verdicts["F6"]["smol-vlm"]["worlds"]
    enough = [f"`{world}`" for world, word in worlds.items() if word == "reproduced"]
    if enough:
        text += f" and suffice alone on {listed(enough)} (F6)"
    reading = "at the question's tokens, as the paper has it."
    if not study("smol-vlm")["reading"]["published"]:
        reading = "at the last row, so its ranking is ours and not the paper's."
    return paragraph(f"{text}. It reads {reading}", indent="  ")


def two_hops() -> str:
    """What the study found of three sizes that go by way of another shape."""
    worlds = ("refer", 'hop:forms=["kind"]')
    refer, hops = ([_depth(name, world) for name in HOPS] for world in worlds)
    parameters = [study(name)["about"]["parameters"] for name in HOPS]
    slope, low, high = slope_over_sizes(
        [[size, *(part[x] for x in ENDS)] for size, part in zip(parameters, hops, strict=True)]
    )
    assert low < 0 < high, "the text below says so"
    f5 = [study(name)["worlds"][worlds[1]]["numbers"]["F5"]["ram"] for name in HOPS]
    lost = [percent_interval(part["top"]["zero"]) for part in f5]
    sizes = listed([f"`{name}`" for name in HOPS])
    text = f"- **Two steps, in three sizes of one recipe**: in {sizes} (6 × 8, 8 × 8 and 12 × 12 "
    text += f"heads) the heads that lead lie at a mean depth of {_values(refer)} where a question "
    text += f"takes one step, and of {_values(hops)} where it takes two (`{worlds[1]}`). With ten "
    text += "times the parameters the latter changes by "
    text += f"{slope:+.2f} [{low:+.2f}, {high:+.2f}]: no trend is shown. Masking them costs "
    text += f"{listed(lost)} points in two steps. Training put the first step into the first half "
    control = _depth("qwen3vl-hop-control", worlds[1])
    text += f"of the layers; without that, once, three heads lie at {_values([control])}."
    return paragraph(text, indent="  ")


def _depth(name: str, world: str) -> dict[str, float]:
    """The mean depth of a model's top heads by RAM as published, with its interval."""
    return study(name)["worlds"][world]["numbers"]["F3"]["ram"]["depth"]


def _values(parts: list[dict[str, float]]) -> str:
    """ "0.34 [0.23, 0.36] and 0.40 [0.30, 0.52]"."""
    return listed([f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for x in parts])


def _random_sets(run: dict[str, Any], shared: bool = True) -> str:
    """How the random sets compare with the top: all above it, or some not; and the heads that
    these share."""
    top = run["top"]["accuracy"]
    above = sorted(x["accuracy"] for x in run["random"] if x["accuracy"] > top)
    below = [x for x in run["random"] if x["accuracy"] <= top]
    total = len(run["random"])
    if not above:
        return f"No random set of {total} leaves more than the top."
    ends = f"{above[0]:.2f} to {above[-1]:.2f}"
    if not below:
        return f"{total} random sets leave {ends}."
    text = f"{len(above)} of {total} random sets leave {ends}, "
    heads = set.intersection(*({tuple(head) for head in x["heads"]} for x in below))
    left = sorted(f"{x['accuracy']:.2f}" for x in below)
    text += f"the other {_word(len(below))} {' to '.join(dict.fromkeys([left[0], left[-1]]))}"
    if shared and heads and len(below) > 1:
        text += f"; these all hold {listed(_names(sorted(heads)))}"
    return text + "."


def _of_benchmark(run: dict[str, Any]) -> list[str]:
    random = [x["accuracy"] for x in run["random"]]
    accuracies = [run[name]["accuracy"] for name in ("clean", "top", "bottom")]
    scored = f"{run['scored']} scenes (`benchmarks/masked_heads.py`)"
    return [scored, f"{run['tested']} others", *_accuracies(*accuracies, random)]


def _of_card(run: dict[str, Any]) -> list[str]:
    heads = run["zeroed"]
    objects = run["options"].get("objects")
    scenes = f"scenes of {_word(objects)} object (its card)" if objects else "scenes (its card)"
    accuracies = _accuracies(run["clean"], heads["top"], heads["bottom"], heads["random"])
    return [f"{run['scored']} {scenes}", f"{run['tested']} others", *accuracies]


def _accuracies(clean: float, top: float, bottom: float, random: list[float]) -> list[str]:
    ends = list(dict.fromkeys(f"{100 * end:.3g}" for end in (min(random), max(random))))
    cells = [f"{100 * accuracy:.3g}%" for accuracy in (clean, top, bottom)]
    return [*cells, f"{' to '.join(ends)}% ({len(random)} sets)"]


def _names(heads: Any) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in heads]


def _word(number: int) -> str:
    return WORDS[number] if number < len(WORDS) else str(number)


TABLES = {
    part.__name__: part
    for part in [
        *(masked, masked_question, masked_language),
        *(language, language_more, made_to_read, counted, formed_by_language, two_hops),
        *(published_mask, backed_up, pages_apart, overall, enough, claims),
    ]
}
