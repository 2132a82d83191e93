"""What stands beside the findings in the committed study: the faithfulness of rankings, and the
design space. docs/_build/tables.py writes them into pages."""

from collections.abc import Iterator
from typing import Any

from markdown_tables import markdown
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


def designs() -> str:
    """What the top 5% of RAM as published cost, and of the reading that costs most, a row a model
    and world."""
    head = ["model and world", "RAM as published: masked", "cut off", "costliest reading: masked"]
    rows = [[*head, "costliest reading: cut off", "random, highest: masked", "cut off"]]
    for place, part in _measured("design"):
        readings = [x for x in part["points"] if not x["key"].startswith("causal")]
        published = next(x for x in readings if x["key"] == "ram")
        cells, random = [], []
        for kind in ("zero", "knockout"):
            most = max(readings, key=lambda x: x[kind]["value"])
            cells.append(f"{_points(most[kind]['value'])} (`{most['key']}`)")
            random.append(_points(part["clean"] * max(part["random"][kind])))
        own = [_points(published[kind]["value"]) for kind in ("zero", "knockout")]
        rows.append([place, *own, *cells, *random])
    return markdown(rows)


def _measured(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every model and world in which it was measured, its name and this part of the study."""
    for name, model in report()["models"].items():
        for world, measured in model["worlds"].items():
            if measured.get(part):
                yield f"`{name}`, {world}", measured[part]


def _points(share: float) -> str:
    return str(round(100 * share))


TABLES = {"faithful": faithful, "designs": designs}
