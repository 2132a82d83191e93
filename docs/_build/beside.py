"""What stands beside the findings in the committed study: the faithfulness of rankings, and the
design space. docs/_build/tables.py writes them into pages."""

from collections.abc import Iterator
from typing import Any

from markdown_tables import markdown, paragraph
from masked import report

RANKINGS = {
    "ram": "RAM as published",
    "ram[rows=last]": "RAM at the last row",
    "visual_mass": "visual mass",
    "causal_knockout": "single heads knocked out",
    "causal_attribution": "attribution",
    "random": "random",
}


def faithful() -> str:
    """CPR and CMD of each ranking, a row a model and world."""
    rows = [["model and world", *RANKINGS.values()]]
    for place, part in _measured("faithfulness"):
        pairs = [part.get(key) for key in RANKINGS]
        rows.append([place, *(f"{x['cpr']:.2f} / {x['cmd']:.2f}" if x else "–" for x in pairs)])
    return markdown(rows)


def circuits() -> str:
    """How far RAM's rankings are circuits, beside random order and causal rankings."""
    parts = [part for _, part in _measured("faithfulness")]

    def ends(key: str) -> str:
        areas = [part[key]["cpr"] for part in parts if key in part]
        return f"{min(areas):.2f} to {max(areas):.2f}"

    text = f"Heads that look are no circuit: the CPR of RAM ({ends('ram')} as published, "
    text += f"{ends('ram[rows=last]')} at the last row) is about that of a random order "
    text += f"({ends('random')}; one order a model). Attribution ({ends('causal_attribution')}) "
    text += f"and knocking out single heads ({ends('causal_knockout')}) rank better in most models."
    return paragraph(text)


def designs() -> str:
    """What the top 5% of RAM as published cost, and of the reading that costs most, a row a model
    and world."""
    head = ["model and world", "RAM as published: masked", "cut off", "costliest reading: masked"]
    rows = [[*head, "costliest reading: cut off", "random, highest: masked", "cut off"]]
    for place, part in _measured("design"):
        published, readings = _readings(part)
        cells, random = [], []
        for kind in ("zero", "knockout"):
            most = max(readings, key=lambda x: x[kind]["value"])
            cells.append(f"{_points(most[kind]['value'])} (`{most['key']}`)")
            random.append(_points(part["clean"] * max(part["random"][kind])))
        own = [_points(published[kind]["value"]) for kind in ("zero", "knockout")]
        rows.append([place, *own, *cells, *random])
    return markdown(rows)


def reading_decides() -> str:
    """What masking costs by the published reading of RAM, and by the costliest at the same rows,
    where that is more than every random set."""
    cases, samples = list[tuple[int, str]](), 0
    for place, part in _measured("design"):
        published, readings = _readings(part)
        same_rows = [x for x in readings if "rows=" not in x["key"]]
        most = max(same_rows, key=lambda x: x["zero"]["value"])
        own, others = (round(100 * x["zero"]["value"]) for x in (published, most))
        random = round(100 * part["clean"] * max(part["random"]["zero"]))
        if others <= random:
            continue
        name = place.partition(",")[0]
        words = f"{name} {own} and {others} points (`{most['key']}`; random sets up to {random})"
        cases.append((others - own, words))
        samples = part["n"]
    widest = [words for _, words in sorted(cases, reverse=True)[:3]]
    text = (
        "- **How RAM is reduced decides what masking its top 5% costs**, at the same rows: by the "
    )
    text += f"published mean, and by the costliest of other readings, {'; '.join(widest)}. (On "
    text += f"{samples} scenes of `refer`, which also picked the costliest.)"
    return paragraph(text, indent="  ")


def _readings(part: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The published reading of RAM, and all."""
    readings = [x for x in part["points"] if not x["key"].startswith("causal")]
    return next(x for x in readings if x["key"] == "ram"), readings


def _measured(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every model and world in which it was measured, its name and this part of the study."""
    for name, model in report()["models"].items():
        for world, measured in model["worlds"].items():
            if measured.get(part):
                yield f"`{name}`, {world}", measured[part]


def _points(share: float) -> str:
    return str(round(100 * share))


TABLES = {
    "faithful": faithful,
    "circuits": circuits,
    "reading_decides": reading_decides,
    "designs": designs,
}
