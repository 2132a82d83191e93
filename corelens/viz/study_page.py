"""The report of a study, drawn from report.json alone: the result first, one row a finding, details
folded."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from corelens.heads.intervals import percent_interval
from corelens.viz import page as p
from corelens.viz.finding_figures import drawn_thresholds, finding_figure
from corelens.viz.study_beside import design, left_out, repeats
from corelens.viz.study_headline import headline

Numbers = Mapping[str, Any]
FEW = 3  # models that the opening tells of one by one
SIGNS = {
    "reproduced": ("yes", "✓"), "not reproduced": ("no", "✗"),
    "cannot be judged here": ("open", "–"),
    "not judged": ("open", "–"),
}  # fmt: skip
READS = {"question": "the question's tokens", "template": "the template", "last": "the last row",
         "answer": "the answer's other rows", "all": "all of these"}  # fmt: skip
METHOD = (
    "**RAM** is the mean over the question's tokens of the attention on the evidence's visual "
    "tokens (arXiv 2606.05843); **excess** is RAM minus what an even spread of the head's visual "
    "mass would put there. The last row is the one that predicts the answer's first token. Heads "
    "are scored on other samples than those tested.",
    "**zero**: the head's output is set to 0. **knockout**: its edges to the evidence are removed "
    "before the softmax. Random sets are drawn from all heads outside the judged ranking's top. "
    "Accuracies and their differences have exact 95% intervals; scores have bootstrap intervals "
    "over samples.",
)


def study_page(report: Numbers, explorer: Markup | None = None) -> str:
    """The whole report as one offline HTML document: the headline and its sweep, the explorer if
    one is given, one row a finding, details folded."""
    names = list(report["models"])
    sections = [p.section("", *headline(report), *_opening(report))]
    if explorer is not None:
        sections.append(p.section("See the heads look", explorer))
    sections.append(p.section("The findings", summary(report)))
    for name, model in report["models"].items():
        title = "Details" if len(names) == 1 else f"Details of {name}"
        sections.append(p.section(title, *_details(report, name, model)))
    sections.append(p.section("How it was done", *METHOD, *_how(report)))
    unbroken = ", ".join(name.replace("-", "\N{NON-BREAKING HYPHEN}") for name in names)
    models = unbroken if len(names) <= 3 else f"{len(names)} models"
    return p.page(f"The heads that fetch the evidence: {models}", sections, _meta(report))


def summary(report: Numbers) -> Markup:
    """One row a finding: verdict, number, small figure, what to conclude. Of several models: one
    column each."""
    if len(report["models"]) > 1:
        return _matrix(report)
    name, model = next(iter(report["models"].items()))
    thresholds = drawn_thresholds(report["criteria"])
    rows = []
    for finding in report["findings"]:
        figure = finding_figure(finding["id"], model, thresholds)
        small = (
            p.svg(figure, f"{finding['id']} {finding['title']}, {name}")
            if figure is not None
            else ""
        )
        rows.append(
            Markup(
                '<tr><th scope="row">{} {}</th><td>{}</td><td>{}<span class="lesson">{}</span></td>'
                '<td class="small ink">{}</td></tr>'
            ).format(
                finding["id"], finding["title"], verdict(finding["models"][name]),
                finding["number"] or "–",
                finding["lesson"], small,
            )
        )  # fmt: skip
    return Markup(
        '<div class="scroll"><table class="claims"><thead><tr><th scope="col">finding</th>'
        '<th scope="col">verdict</th><th scope="col">number, and what it says of the paper</th>'
        '<th scope="col"></th></tr></thead><tbody>{}</tbody></table></div>'
    ).format(Markup("").join(rows))


def verdict(judged: Numbers) -> Markup:
    """The verdict as a badge: a sign and words, so that its colour is not needed; the reason below
    it."""
    kind, sign = SIGNS[judged["word"]]
    reason = (
        Markup('<span class="scope">{}</span>').format(judged["reason"]) if judged["reason"] else ""
    )
    return Markup('<span class="verdict {}">{} {}</span>{}').format(
        kind, sign, judged["shown"], reason
    )


def _matrix(report: Numbers) -> Markup:
    names = list(report["models"])
    rows = []
    for finding in report["findings"]:
        cells = []
        for name in names:
            kind, sign = SIGNS[finding["models"][name]["word"]]
            shown = finding["models"][name]["shown"]
            cells.append(
                Markup('<td><span class="verdict {}">{} {}</span></td>').format(kind, sign, shown)
            )
        heading = Markup('<th scope="row">{} {}</th>').format(finding["id"], finding["title"])
        rows.append(Markup("<tr>{}{}</tr>").format(heading, Markup("").join(cells)))
    head = Markup("").join(
        Markup('<th scope="col">{}</th>').format(name) for name in ("finding", *names)
    )
    table = (
        '<div class="scroll bleed"><table class="claims"><thead><tr>{}</tr></thead><tbody>{}'
        "</tbody></table></div>"
    )
    return Markup(table).format(head, Markup("").join(rows))


def _opening(report: Numbers) -> list[Markup]:
    """Where each model reads, before any verdict; and what was left out."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, model in report["models"].items():
        reading = model["reading"]
        # (each of a few models has a sentence of its own, with its accuracies)
        own = name if len(report["models"]) <= FEW or reading["key"] is None else ""
        alike.setdefault((reading["published"], own), []).append(name)
    sentences = [_reads(names, report["models"]) for names in alike.values()]
    for world, wrong in report["unreadable"].items():
        sentences.append(
            f"{len(wrong)} samples of {world} were left out because a picture cannot be read: "
            f"{'; '.join(wrong)}."
        )
    return [p.note(*sentences, *left_out(report))]


def _reads(names: Sequence[str], models: Numbers) -> str:
    """Where models that read at the same rows do so; of a single one its accuracies, too."""
    reading = models[names[0]]["reading"]
    parts = [(world, part) for name in names for world, part in models[name]["worlds"].items()]
    tested = ", ".join(f"{world} {_clean(part)}" for world, part in parts if part["clean"])
    single = len(names) == 1
    answers = f" Accuracy: {tested}." if tested and single else ""
    named = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if reading["key"] is None:
        return f"**No ranking of {named}'s heads can be judged**: {reading['reason']}.{answers}"
    if reading["published"]:
        return (
            f"**{named} read{'s' if single else ''} the evidence at the question's tokens**, as "
            f"the paper has it: RAM is judged.{answers}"
        )
    costs = [
        part["row_costs"]["question"]
        for _, part in parts
        if part["row_costs"] and not part["why_not"]
    ]
    lost = " to ".join(
        dict.fromkeys(f"{100 * value:.0f}" for value in (min(_values(costs)), max(_values(costs))))
    )
    return (
        f"**{named} do{'es' if single else ''} not read the evidence as the paper has it**: "
        f"cutting it from the question's tokens in all heads costs {lost} points. "
        f"{'It reads' if single else 'They read'} at the last row, so the verdicts are about the "
        "heads of highest RAM at the last row, a reading of ours."
        f"{answers}"
    )


def _values(costs: list[Numbers]) -> list[float]:
    return [cost["value"] + 0.0 for cost in costs]


def _clean(part: Numbers) -> str:
    return f"{100 * part['clean']['value']:.0f}% of {part['tested']}"


def _details(report: Numbers, name: str, model: Numbers) -> list[Markup]:
    parts = []
    if len(report["models"]) > 1:
        rows = []
        for finding in report["findings"]:
            judged = finding["models"][name]
            rows.append(
                [finding["id"], judged["shown"], judged["number"] or "–", judged["reason"] or "–"]
            )
        parts.append(
            p.folded("Verdicts", p.table(["finding", "verdict", "number", "reason"], rows))
        )
    not_counting = [
        [world, part["why_not"]] for world, part in model["worlds"].items() if part["why_not"]
    ]
    if not_counting:
        parts.append(p.folded("Worlds that do not count", p.table(["world", "why"], not_counting)))
    parts += [*_rows(model), *_interventions(model), *_faithfulness(model), *design(model)]
    return [*parts, *_over_n(model), *repeats(model)]


def _rows(model: Numbers) -> list[Markup]:
    rows = []
    for world, part in model["worlds"].items():
        if part["row_costs"]:
            cells = [
                percent_interval(part["row_costs"][group]) if group in part["row_costs"] else "–"
                for group in READS
            ]
            rows.append([world, *cells])
    if not rows:
        return []
    caption = (
        "Points lost when the evidence is cut from these rows in all heads, on the scoring "
        "samples, with Newcombe's 95% intervals."
    )
    return [
        p.folded(
            "Which rows the answer hangs on", p.table(["world", *READS.values()], rows, caption)
        )
    ]


def _interventions(model: Numbers) -> list[Markup]:
    rows = []
    for world, part in model["worlds"].items():
        numbers = part["numbers"].get("F5")
        if numbers is None:
            continue
        for key in (key for key in part["scores"] if key in numbers):
            for role in ("top", "bottom"):
                costs = numbers[key][role]
                kinds = [
                    percent_interval(costs[kind]) if kind in costs else "–"
                    for kind in ("zero", "uniform", "knockout")
                ]
                rows.append([f"{world}: {role} by {key}", *kinds])
        spread = [
            _quantile(numbers["random"].get(kind)) for kind in ("zero", "uniform", "knockout")
        ]
        rows.append([f"{world}: random, 95% quantile", *spread])
    if not rows:
        return []
    caption = (
        "Points lost without the output (zero), with even attention (uniform), or without "
        "sight of the evidence."
    )
    return [
        p.folded(
            "What the heads cost", p.table(["heads", "zero", "uniform", "knockout"], rows, caption)
        )
    ]


def _quantile(relative: list[float] | None) -> str:
    if not relative:
        return "–"
    ordered = sorted(relative)
    return f"{100 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]:.0f}% of clean"


def _faithfulness(model: Numbers) -> list[Markup]:
    rows = []
    for world, part in model["worlds"].items():
        for ranking, areas in (part["faithfulness"] or {}).items():
            if isinstance(areas, dict):
                rows.append([f"{world}: {ranking}", f"{areas['cpr']:.2f}", f"{areas['cmd']:.2f}"])
    if not rows:
        return []
    caption = (
        "CPR (higher is better) and CMD (lower is better) of MIB, arXiv 2504.13151, by "
        "interchange of heads."
    )
    return [
        p.folded("Faithfulness of the rankings", p.table(["ranking", "CPR", "CMD"], rows, caption))
    ]


def _over_n(model: Numbers) -> list[Markup]:
    rows = []
    for world, part in model["worlds"].items():
        for key, agreement in part["agreement_over_n"].items():
            for row in agreement:
                rows.append(
                    [f"{world}: {key}", row["n"], f"{row['spearman']:.2f}", f"{row['jaccard']:.2f}"]
                )
    if not rows:
        return []
    caption = "Two rankings from n samples each, none in common."
    columns = ["ranking", "n", "Spearman ρ", "Jaccard"]
    return [p.folded("How many samples a ranking needs", p.table(columns, rows, caption))]


def _how(report: Numbers) -> list[Markup]:
    claims = [
        [finding["id"], finding["claim"], finding["criterion"]] for finding in report["findings"]
    ]
    sources = dict.fromkeys(criterion["source"] for criterion in report["criteria"])
    options = [[name.replace("_", " "), _words(value)] for name, value in report["options"].items()]
    for name, model in report["models"].items():
        for world, part in model["worlds"].items():
            options.append(
                [f"{name}, {world}", f"{part['scored']} scored, {part['tested']} tested"]
            )
            if part["without_region"]:
                options[-1][1] += f", {part['without_region']} without a region left out"
    parts = [
        p.folded("Claims and criteria", p.table(["", "claimed", "reproduced if"], claims)),
        p.folded(
            "Options and samples",
            p.table(["setting", "value"], options),
            f"Thresholds from: {'; '.join(sources)}.",
        ),
    ]
    if report.get("command"):
        parts.append(p.text(f"Made by `{report['command']}`."))
    return parts


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _meta(report: Numbers) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    for name, model in report["models"].items():
        about = model["about"]
        shape = f"{about['n_layers']} layers × {about['n_heads']} heads"
        meta[name] = f"{about['family']}, {shape}, {about['dtype']}, weights {about['weight_hash']}"
    meta["versions"] = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return meta
