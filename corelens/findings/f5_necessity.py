"""F5, necessity: without the top heads the model fails, and without as many others it hardly notices."""

from collections.abc import Mapping, Sequence
from typing import Any

from corelens.evaluation.evaluate import Point
from corelens.findings.finding import NOT_REPRODUCED, Brief, Claim, Finding, cell, judge, points
from corelens.findings.options import CONTROLLED, KIND_WORDS, LEVEL, RANKINGS, READERS, selection_name
from corelens.findings.setting import Setting

MUCH, LITTLE = 0.20, 0.02
CLAIM = Claim(
    "F5",
    "Necessity",
    "Ablating only the top 5% of heads causes significant degradation, whereas ablating lower-ranked heads has minimal "
    "effect.",
    "arXiv 2606.05843, abstract; the intervention there is attention masking (here: knockout)",
    f"Under knockout the top heads cost at least {100 * MUCH:.0f} points, as many random heads at most "
    f"{100 * LITTLE:.0f}, and the paired difference between the two is above zero at the level {LEVEL:.1%} (three "
    "readings of RAM are tried).",
    ("regions", "accuracy"),
)


def measure(setting: Setting) -> dict[str, Any]:
    """What the top heads and their controls cost under each ablation; who reads the evidence; the curves."""
    options = setting.options
    sets = {share: setting.sets(share) for share in {options.fraction, *options.fractions}}
    readers = {}
    for rows in READERS:
        cut = setting.knocked(f"cut region from {rows}", None, rows)
        readers[rows] = point_json(Point(1.0, 0, setting.mean(cut), setting.lost(cut)))
    table, contrast = [], {}
    for (role, ranking), chosen in sets[options.fraction].items():
        found = {kind: setting.point(chosen, kind, options.fraction) for kind in options.kinds}
        table.append({"selection": selection_name(role, ranking), "role": role, "ranking": ranking,
                      "ablations": {kind: point_json(one) for kind, one in found.items()}})  # fmt: skip
    for name in RANKINGS:
        random, top = sets[options.fraction]["random", ""], sets[options.fraction]["top", name]
        gap = setting.gap(setting.ablated(random, "knockout"), setting.ablated(top, "knockout"))
        contrast[name] = gap._asdict()
    sweeps = [
        {"kind": kind, "clean": setting.clean.interval._asdict(), "curves": _curves(setting, sets, kind)}
        for kind in options.sweep_kinds
    ]
    return {"readers": readers, "table": table, "contrast": contrast, "sweeps": sweeps, "notes": setting.notes}


def _curves(setting: Setting, sets: dict[float, dict[tuple[str, str], Any]], kind: str) -> dict[str, list[Any]]:
    lines = [("top", name) for name in CONTROLLED] + [("bottom", CONTROLLED[0]), ("random", "")]
    return {
        (f"top, {ranking}" if role == "top" else role): [
            {"fraction": share} | point_json(setting.point(sets[share][role, ranking], kind, share))
            for share in sorted(setting.options.fractions)
        ]
        for role, ranking in lines
    }


def point_json(point: Point) -> dict[str, Any]:
    """A Point as results carry it."""
    told = {"k": point.k, "accuracy": point.accuracy._asdict(), "drop": point.drop._asdict()}
    return told | ({"heads": point.draws} if point.draws else {})


def row(numbers: Mapping[str, Any], role: str, ranking: str = "") -> dict[str, Any]:
    """The line of the table with this role and ranking."""
    return next(one for one in numbers["table"] if (one["role"], one["ranking"]) == (role, ranking))


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows: points lost."""

    def lost(role: str, ranking: str, kind: str) -> Any:
        return row(numbers, role, ranking)["ablations"][kind]["drop"]

    return {
        name: {"top, knockout": lost("top", name, "knockout"), "top, zero": lost("top", name, "zero")}
        | {"bottom, knockout": lost("bottom", name, "knockout"), "random, knockout": lost("random", "", "knockout")}
        for name in CONTROLLED
    }  # fmt: skip


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds."""
    from corelens.viz import page
    from corelens.viz.curves import ablation_curves

    outcomes: dict[str, dict[str, bool]] = {}
    finding = Finding(CLAIM, NOT_REPRODUCED, [])
    for setting, numbers in runs:
        random = row(numbers, "random")["ablations"]["knockout"]["drop"]
        outcomes[setting.label] = {
            name: row(numbers, "top", name)["ablations"]["knockout"]["drop"]["value"] >= MUCH
            and random["value"] <= LITTLE
            and numbers["contrast"][name]["low"] > 0
            for name in RANKINGS
        }
        k = row(numbers, "random")["ablations"]["knockout"]["k"]
        said = "; ".join(
            f"{points(row(numbers, 'top', name)['ablations']['knockout']['drop'].values())} by {name}"
            for name in RANKINGS
        )
        finding.measured.append(
            f"{setting.label}: knocking out the top {k} heads costs {said}; {k} random heads {points(random.values())}."
        )
        finding.add(
            *_tables(setting, numbers),
            *(
                finding.draw(
                    f"ablation-{setting.label}-{sweep['kind']}",
                    ablation_curves(
                        {name: [(x["fraction"], *x["accuracy"].values()) for x in line] for name, line in
                         sweep["curves"].items()}, baseline=sweep["clean"]["value"],
                    ),
                    f"{setting.label}: accuracy as more heads are ablated ({KIND_WORDS[sweep['kind']]}); bands: 95% "
                    "bootstrap over samples.",
                )
                for sweep in numbers["sweeps"]
            ),
        )  # fmt: skip
        finding.add(
            page.note(
                "**Layer-matched** draws take other heads of the same layers. In a small model those are the next-best "
                "retrieval heads, so their cost is no noise.",
                *(f"In this run: {note}." for note in numbers["notes"]),
            )
        )
    finding.verdict, finding.scope = judge(outcomes)
    finding.numbers = {"met": outcomes}
    finding.explanation = _explain(runs, outcomes)
    return finding


def _explain(runs: Sequence[tuple[Setting, dict[str, Any]]], outcomes: dict[str, dict[str, bool]]) -> str:
    """Who reads the evidence, before any head is chosen, says which reading of RAM can find the heads."""
    said = []
    for setting, numbers in runs:
        lost = {rows: numbers["readers"][rows]["drop"]["value"] for rows in ("question", "last+answer")}
        by = [name for name, met in outcomes[setting.label].items() if met]
        said.append(
            f"{setting.label}: cutting the evidence from the question's tokens in all heads costs "
            f"{100 * lost['question']:.0f} points, from the last row and the answer's {100 * lost['last+answer']:.0f}."
        )
        if lost["question"] < MUCH <= lost["last+answer"]:
            said.append(
                "The model reads the evidence at the last row alone: heads of high RAM over question rows look, and "
                "the answer does not need it"
                + (
                    ", while RAM of the last row finds the heads that matter."
                    if by
                    else "; nor does one small set do it."
                )
            )
        elif lost["last+answer"] < MUCH <= lost["question"]:
            said.append("The question's rows carry it, as the paper's reading assumes.")
        elif max(lost.values()) < MUCH:
            said.append("Neither alone carries it: it takes more than one way to the answer.")
        costly = [
            f"{one['selection']} ({kind} {100 * x['drop']['value']:.0f} points)"
            for one in numbers["table"]
            for kind, x in one["ablations"].items()
            if one["role"] in ("bottom", "layer-matched") and x["drop"]["value"] >= MUCH / 2
        ]
        if costly:
            said.append(f"Controls that are not harmless: {', '.join(costly)}.")
    if any(words.startswith("Controls") for words in said):
        said.append(
            "A head of low RAM may be needed for something else (its output removed), or read the evidence at other "
            "rows (its sight of it cut): of lower-ranked heads, only random ones speak for all."
        )
    return " ".join(said)


def _tables(setting: Setting, numbers: dict[str, Any]) -> list[Any]:
    """Accuracy under each ablation of each selection of heads; and who reads the evidence."""
    from corelens.viz import page

    kinds = list(setting.options.kinds)
    rows = [["no ablation", "", *[cell(setting.clean.interval)] * len(kinds)]]
    for one in numbers["table"]:
        point = one["ablations"][kinds[0]]
        heads = f"{point['k']} × {len(point['heads'])} draws" if len(point["heads"]) > 1 else f"{point['k']}"
        name = one["selection"].replace("top:", f"top {setting.options.fraction:.0%}:")
        rows.append([name, heads, *[cell(one["ablations"][kind]["accuracy"]) for kind in kinds]])
    roles = ["", *(one["role"] for one in numbers["table"])]
    table = page.table(
        ["heads ablated", "heads", *[KIND_WORDS[kind] for kind in kinds]],
        rows,
        f"{setting.label}: accuracy (greedy exact match) on {len(setting.to_test)} samples, with 95% bootstrap "
        f"intervals. Heads were scored on {len(setting.to_score)} other samples.",
        hot=[i for i, role in enumerate(roles) if role == "top"],
        groups=[1, roles.index("bottom"), roles.index("random")],
    )
    readers = page.table(
        ["rows cut from the region, in all heads", "accuracy", "lost"],
        [[READERS[rows], cell(x["accuracy"]), cell(x["drop"])] for rows, x in numbers["readers"].items()],
        f"{setting.label}: before any head is chosen, the edges from some rows to the evidence are cut in **all** "
        "heads. Rows whose edges cost nothing do not read it, and RAM over them ranks heads that the answer does not "
        "need.",
    )
    return [table, readers]
