"""What masking whole heads costs: tables and text of benchmarks/results/masked_heads.json, of the
committed study and of the models' cards. docs/_build/tables.py writes them into pages."""

import json
from pathlib import Path
from typing import Any

from cards import card
from markdown_tables import interval, markdown, paragraph

ROOT = Path(__file__).parents[2]
WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def runs() -> dict[str, Any]:
    """{model: its run of the benchmark}."""
    path = ROOT / "benchmarks/results/masked_heads.json"
    return json.loads(path.read_text(encoding="utf-8"))["models"]


def study(model: str) -> dict[str, Any]:
    """A model's part of the committed study."""
    path = ROOT / "docs/study/report.json"
    return json.loads(path.read_text(encoding="utf-8"))["models"][model]


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
    return paragraph(text + _random_sets(run, shared=False) + " More: [worlds](docs/worlds.md).")


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
    return paragraph(f"{text}({n} scenes). The same heads look from both.")


def question_reads() -> str:
    """Where qwen3vl-q reads, by its card."""
    measured = card("qwen3vl-q")["reads"][0]
    right = round(measured["n"] * measured["clean"])
    left = [right - round(measured["n"] * measured["cost"][x][0]) for x in ("question", "last")]
    text = f"Of {measured['n']} scenes it answers {right} right. With the evidence cut from the "
    text += f"question's rows in all heads, {left[0]} stay right; with the evidence cut from the "
    return paragraph(f"{text}last row, {left[1]}.")


def counted() -> str:
    """How many samples and random sets the committed study rests on."""
    report = json.loads((ROOT / "docs/study/report.json").read_text(encoding="utf-8"))
    parts = [
        (name, part)
        for name, model in report["models"].items()
        for part in model["worlds"].values()
    ]
    tested: dict[int, list[str]] = {}
    for name, part in parts:
        names = tested.setdefault(part["tested"], [])
        names += [] if f"`{name}`" in names else [f"`{name}`"]
    scored = [str(n) for n in sorted({part["scored"] for _, part in parts})]
    sets = max(len(x["numbers"]["F5"]["random"]["zero"]) for _, x in parts if "F5" in x["numbers"])
    others = ", ".join(f"{n} others of {_listed(names)}" for n, names in tested.items())
    text = (
        f"{_listed(scored, 'or')} scenes per world rank the heads, and others test them: {others}. "
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
    report = json.loads((ROOT / "docs/study/report.json").read_text(encoding="utf-8"))
    in_all, in_some, elsewhere = list[str](), list[str](), list[str]()
    costly, others = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, model in report["models"].items():
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
    text += f"{_listed(in_all + in_some)}**: the top 5% cost {_points(costly, 'top')} points, "
    text += f"more than every random set, and the bottom 5% {_points(costly, 'bottom')}. In "
    text += f"{_listed(elsewhere)} the answer does not need what these heads fetch at the "
    text += "question's tokens: many of them fetch it at the last row, too. In all other worlds "
    text += f"the top 5% cost {_points(others, 'top')} points."
    return paragraph(text, indent="  ")


def backed_up() -> str:
    """Of qwen3vl-q-compare: what masking heads costs, and cutting the evidence off from them."""
    masked_costs, cut, random = [], [], []
    worlds = study("qwen3vl-q-compare")["worlds"]
    for part in worlds.values():
        f5, right = part["numbers"]["F5"], part["clean"]["value"]
        masked_costs.append(f"{100 * f5['ram']['top']['zero']['value']:.0f}")
        cut.append(f"{100 * f5['ram']['top']['knockout']['value']:.0f}")
        random.append(100 * right * max(f5["random"]["knockout"]))
    text = "- **Masking heads and cutting the evidence off from them can disagree**: in "
    text += "`qwen3vl-q-compare`, in whose training heads were left out, masking the top 5% costs "
    text += f"{' and '.join(masked_costs)} points ({_listed([f'`{name}`' for name in worlds])}). "
    text += f"Cutting the evidence off from the same heads costs {' and '.join(cut)}; from random "
    text += f"heads, {max(random):.0f} at the most."
    return paragraph(text, indent="  ")


def _points(worlds: list[dict[str, Any]], heads: str) -> str:
    """ "46 to 80": the range over these worlds."""
    values = [100 * world[heads]["value"] for world in worlds]
    return f"{min(values):.0f} to {max(values):.0f}"


def formed_by_language() -> str:
    """What the study found of smol-vlm, in a sentence for each thing."""
    path = ROOT / "docs/study/report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    verdicts = {x["id"]: x["models"]["smol-vlm"]["shown"] for x in report["findings"]}
    claims = {"F1": "they are few", "F3": "they lie late", "F6": "they suffice alone"}
    true = [f"{claim} ({x})" for x, claim in claims.items() if verdicts[x] == "reproduced"]
    model = report["models"]["smol-vlm"]
    reading = "at the question's rows, as the paper has it"
    if not model["reading"]["published"]:
        reading = "at the last row, so its ranking is ours and not the paper's"
    judged = [f"`{name}`" for name, part in model["worlds"].items() if "F5" in part["numbers"]]
    text = f"- **Where the heads were formed by language, {_listed(true)}**: `smol-vlm`. It reads "
    text += f"{reading}, and was judged on {_listed(judged)} alone."
    return paragraph(text, indent="  ")


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
        text += f"; these all hold {_listed(_names(sorted(heads)))}"
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


def _listed(names: list[str], last: str = "and") -> str:
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _word(number: int) -> str:
    return WORDS[number] if number < len(WORDS) else str(number)


TABLES = {
    part.__name__: part
    for part in [
        *(masked, masked_question, masked_language),
        *(language, language_more, question_reads, counted, formed_by_language),
        *(published_mask, backed_up),
    ]
}
