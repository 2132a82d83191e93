"""What the card beside a model's weights says of its training."""

from pathlib import Path
from typing import Any

from corelens.demo import list_demos, read_card


def trained(name_or_path: str) -> dict[str, Any]:
    """{"name", "seed", "parameters", "starts": what it was trained on from, the last first}; {} without a card."""
    path = Path(name_or_path or ".")
    if (path / "card.json").exists():
        card = read_card(path.name, path.parent)
    elif name_or_path in list_demos():
        card = read_card(name_or_path)
    else:
        return {}
    starts, before = [], card["training"]["recipe"].get("start")
    while before:
        starts.append(before)
        before = read_card(before)["training"]["recipe"].get("start") if before in list_demos() else None
    told = {"name": card["name"], "seed": card["training"]["seed"], "parameters": card["parameters"]}
    return told | {"starts": starts}
