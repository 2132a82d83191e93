"""Which reading of RAM is judged: the one at whose rows the answer hangs on the evidence."""

from collections.abc import Mapping
from typing import Any

from corelens.findings.options import PUBLISHED, READINGS, ROWS

TOGETHER = "all"


def judged_reading(row_costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The reading whose heads this study judges, and why.

    Args:
        row_costs: {world: {group of rows: what cutting the region from them in all heads costs}};
            of the worlds that count, measured on the scoring samples.

    A reading qualifies if cutting the evidence from its rows costs something in every world
    (Newcombe's 95% interval above zero). Of those that qualify the one whose rows cost most is
    judged; the published one if they cost the same.

    Returns:
        {"key", or None if no reading can be judged; "words", "published", "reason"}.
    """
    if not row_costs:
        return _none("the model answers no world well enough")
    qualified = {}
    for key, rows in ROWS.items():
        costs = [world[rows] for world in row_costs.values()]
        if all(cost["low"] > 0 for cost in costs):
            qualified[key] = sum(cost["value"] for cost in costs) / len(costs)
    if not qualified:
        together = all(world[TOGETHER]["low"] > 0 for world in row_costs.values())
        if together:
            return _none(
                "no single group of rows is needed in every world: the evidence is read at several"
            )
        return _none(
            "cutting the evidence from the question's, last and answer's rows costs nothing that "
            "is certain"
        )
    key = max(qualified, key=lambda candidate: (qualified[candidate], candidate == PUBLISHED))
    return {"key": key, "words": READINGS[key], "published": key == PUBLISHED, "reason": ""}


def _none(reason: str) -> dict[str, Any]:
    return {"key": None, "words": READINGS[PUBLISHED], "published": True, "reason": reason}
