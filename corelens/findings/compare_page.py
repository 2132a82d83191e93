"""The page that sets studies of several models side by side: verdicts, the numbers they rest on, how heads agree."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from corelens.findings.finding import cell
from corelens.findings.options import CONTROLLED
from corelens.viz import page as p
from corelens.viz.study_figures import depth_profiles
from corelens.viz.study_page import SIGNS

if TYPE_CHECKING:
    from corelens.findings.compare import Comparison

NUMBERING = (
    "**Seeds.** Heads of two trainings have no common numbering: which head of a layer comes to retrieve is arbitrary. "
    "So between seeds only the layers can be expected to agree (the last column: correlation of the layers' mean RAM); "
    "between a model and one trained on from it, the heads themselves can."
)
POINTS = {"F5", "F7"}  # shares of the samples, shown in points


def compare_page(comparison: "Comparison") -> str:
    """The whole comparison as one offline HTML document; it links to the reports beside it."""
    models = list(comparison.reports)
    claims = {one["id"]: one for report in comparison.reports.values() for one in report["findings"]}
    sections = [
        p.section("What was found", _verdicts(comparison, claims), _studied(comparison)),
        *(_finding(comparison, id, claims[id]) for id in sorted(claims)),
        p.section(
            "Beside the papers",
            p.table(
                ["what", "published", "here", "comparable?"], comparison.beside(), "The papers' published figures."
            ),
        ),
    ]
    told = {model: _weights(comparison.about(model)) for model in models}
    commands = {f"{model}, command": comparison.reports[model]["command"] for model in models}
    return p.page(
        "The heads that fetch the evidence, across models",
        sections,
        told | {name: words for name, words in commands.items() if words},
        subtitle=f"What the papers claim of retrieval heads, measured on {len(models)} models, each on its own worlds",
    )


def _verdicts(comparison: "Comparison", claims: Mapping[str, Any]) -> Markup:
    """Findings × models."""
    head = Markup("").join(
        Markup('<th scope="col"><a href="{}/report.html">{}</a></th>').format(model, model)
        for model in comparison.reports
    )
    rows = []
    for id, claim in sorted(claims.items()):
        cells = []
        for model in comparison.reports:
            found = comparison.finding(model, id)
            kind, sign = SIGNS[found["verdict"]] if found else ("open", "–")
            badge = Markup('<span class="verdict {}">{} {}</span>').format(
                kind, sign, found["verdict"] if found else "not studied"
            )
            scope = Markup('<span class="scope">{}</span>').format(found["scope"]) if found and found["scope"] else ""
            cells.append(Markup("<td>{}{}</td>").format(badge, scope))
        title = f"{id} {claim['title']}"
        rows.append(
            Markup('<tr><th scope="row"><a href="#{}">{}</a></th>{}</tr>').format(
                p.section(title).anchor, title, Markup("").join(cells)
            )
        )
    return Markup(
        '<div class="scroll bleed"><table class="zoo">'
        "<caption>Findings and models; a model's name leads to its report.</caption>"
        '<thead><tr><th scope="col">finding</th>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, Markup("").join(rows))


def _studied(comparison: "Comparison") -> Markup:
    rows = []
    for model, report in comparison.reports.items():
        for world, one in report["worlds"].items():
            clean = cell(one["clean"]) if one["clean"] else "no answers"
            rows.append([model, world, one["scored"], one["evaluated"], clean])
    return p.table(
        ["model", "world", "scored", "tested", "clean accuracy"], rows, "What was studied, and how well it is answered."
    )


def _finding(comparison: "Comparison", id: str, claim: Mapping[str, Any]) -> p.Section:
    said = [f"Claimed: {claim['claim']} ({claim['source']})", f"Counts as reproduced if: {claim['criterion']}"]
    parts: list[Any] = list(said)
    if id == "F2":
        parts += _agreement(comparison)
    if id == "F3":
        parts += _profiles(comparison)
    rows = comparison.rows(id)
    if rows:
        marked = [i for i, row in enumerate(rows) if row["reading"] == CONTROLLED[-1]]
        for row in rows:
            row["reading"] = _reading(row["reading"])
            row["world"] += "" if row["answered"] else " (not answered)"
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "answered"))
        shown = [[_shown(row.get(key), id) if key in row else "–" for key in columns] for row in rows]
        unit = "Points of accuracy lost" if id in POINTS else "Numbers"
        note = " Rows of the last-row reading are marked." if marked else ""
        parts.append(p.table(columns, shown, f"{unit} with 95% intervals.{note}", hot=marked))
    why = [
        f"**{model}**: {found['explanation']}"
        for model in comparison.reports
        if (found := comparison.finding(model, id)) and found["explanation"]
    ]
    same = len({words.split("**: ", 1)[1] for words in why}) == 1
    parts += [why[0].split("**: ", 1)[1]] if same else why
    return p.section(f"{id} {claim['title']}", *parts)


def _shown(value: Any, id: str) -> Any:
    if isinstance(value, Mapping | list | tuple):
        numbers = list(value.values()) if isinstance(value, Mapping) else list(value)
        rounded = [round(100 * x) for x in numbers] if id in POINTS else [round(x, 2) + 0.0 for x in numbers]
        return cell(rounded, 0 if id in POINTS else 2)
    return f"{value:.2f}" if isinstance(value, float) else value


def _reading(name: str) -> str:
    """ "RAM (last row)" → "last row"."""
    return name.removeprefix("RAM (").removesuffix(")")


def _agreement(comparison: "Comparison") -> list[Markup]:
    """F2 over worlds and over models."""
    between = comparison.between_worlds()
    parts = []
    if between:
        rows = [
            [one["model"], " – ".join(one["worlds"]), _reading(one["ranking"]), one["spearman"], one["jaccard"],
             one["chance"], "yes" if one["counts"] else "not answered"]
            for one in between
        ]  # fmt: skip
        columns = ["model", "worlds", "reading", "Spearman ρ", "Jaccard", "95% of chance", "counts"]
        parts.append(p.table(columns, _rounded(rows), "The same heads in other worlds."))
    across = comparison.between_models()
    if across:
        rows = [
            [" – ".join(one["models"]), one["relation"], one["world"], _reading(one["reading"]), one["spearman"],
             one["ceiling"], one["jaccard"], one["chance"], one["layers"]]
            for one in across
        ]  # fmt: skip
        columns = ["models", "relation", "world", "reading", "Spearman ρ", "ceiling ρ", "Jaccard", "95% of chance",
                   "layers, r"]  # fmt: skip
        words = (
            "The same heads in other models of one architecture. Ceiling: two halves of one model's samples, which two "
            "models may exceed where samples are few."
        )
        parts += [p.table(columns, _rounded(rows), words), p.note(NUMBERING)]
    return parts


def _rounded(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[f"{x:.2f}" if isinstance(x, float) else x for x in row] for row in rows]


def _profiles(comparison: "Comparison") -> list[Markup]:
    """F3 over models, on relative depth, in the first world of each."""
    drawn = []
    for name in CONTROLLED:
        profiles, depths = {}, {}
        for model, report in comparison.reports.items():
            world, numbers = next(iter(report["worlds"].items()))
            if "layers" in numbers:
                about = comparison.about(model)
                label = f"{model} ({about['n_layers']} × {about['n_heads']}, {world})"
                profiles[label] = numbers["layers"][name]["profile"]
                depths[label] = numbers["layers"][name]["depth"][0]
        if profiles:
            caption = (
                f"{name}: where each model (layers × heads, world) holds it, over relative depth; 1 is an even spread. "
                "The marker is the mean depth of its top heads."
            )
            drawn.append(p.figure(depth_profiles(profiles, depths), caption))
    return drawn


def _weights(about: Mapping[str, Any]) -> str:
    size = f"{about['training']['parameters'] / 1e6:.1f} M parameters, " if about["training"] else ""
    return f"{about['family']}, {size}{about['n_layers']} × {about['n_heads']} heads, weights {about['weight_hash']}"
