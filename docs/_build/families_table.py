"""The tables of model families, from benchmarks/results/families.json and token_maps.json."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from markdown_tables import markdown

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
# what people use in 2026, as the table's first part, in this order
FIRST = {
    "Qwen3.5": ["qwen3_5", "qwen3_5_moe"], "Qwen3-VL": ["qwen3_vl", "qwen3_vl_moe"],
    "Qwen2-VL, Qwen2.5-VL": ["qwen2_vl", "qwen2_5_vl"], "Gemma 4": ["gemma4", "gemma4_unified"],
    "Gemma 3": ["gemma3"], "GLM-4.xV": ["glm4v", "glm4v_moe", "glm46v"], "Llama 4": ["llama4"],
    "Mistral 3": ["mistral3"], "Phi-4-multimodal": ["phi4_multimodal"], "LFM2-VL": ["lfm2_vl"],
    "Qwen-Omni": [
        "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker"
    ],
    "Kimi K2.5": ["kimi_k25"], "Molmo 2": ["molmo2"], "InternVL": ["internvl"],
    "SmolVLM": ["smolvlm"],
    "LLaVA": ["llava", "llava_next", "llava_onevision"], "DeepSeek-OCR 2": ["deepseek_ocr2"],
    "Nemotron Omni": ["nemotron_h_omni"],
}  # fmt: skip
CHECKS = ("unhooked", "no_op", "pattern", "written_z", "written_pattern", "generated", "untouched")
WORDS = {
    "unhooked": "a run without hooks", "no_op": "hooks that do nothing", "pattern": "pattern",
    "written_z": "writing z", "written_pattern": "writing the pattern", "generated": "generate",
    "untouched": "the model afterwards",
}  # fmt: skip
HEAD = ["type", "verdict", "layers with heads", "hooks", "residual stream", "token map"]
MAP_HEAD = ["type", "token map", "tokens", "painted cells that are right", "of the shifted map",
            "RAM", "answer"]  # fmt: skip


@cache
def read(name: str = "families") -> dict[str, Any]:
    """All that was measured: of each type, or of its token map."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def families() -> str:
    """The families that are used most, one row a type."""
    rows = read()["types"]
    table = [["model", *HEAD]]
    for name, types in FIRST.items():
        table += [[name, *cells(rows[t])] for t in types if t in rows]
    return markdown(table)


def all_families() -> str:
    """Every other type, in the order of the alphabet."""
    first = {t for types in FIRST.values() for t in types}
    rows = {name: row for name, row in read()["types"].items() if name not in first}
    return markdown([HEAD, *map(cells, rows.values())])


def counts() -> list[str]:
    """How many types there are, are served, are refused, have a token map."""
    rows = list(read()["types"].values())
    verdicts = [sum(row["verdict"] == word for row in rows) for word in ("served", "refused")]
    return [str(number) for number in (len(rows), *verdicts, len(mapped()))]


def family_counts() -> str:
    """How many types of each verdict there are, and how many have a token map."""
    measured = read()
    rows = list(measured["types"].values())
    counts = {
        v: sum(row["verdict"] == v for row in rows) for v in ("served", "refused", "silently wrong")
    }
    others = len(rows) - sum(counts.values())
    table = [
        [
            "transformers",
            "types",
            *counts,
            "not run, or an error without a name",
            "with a token map",
        ]
    ]
    version = measured["versions"]["transformers"]
    table.append(
        [version, str(len(rows)), *map(str, counts.values()), str(others), str(len(mapped()))]
    )
    return markdown(table)


def cells(row: dict[str, Any]) -> list[str]:
    """One type's cells."""
    name = f"`{row['type']}`"
    for why in ("refused", "broken", "unrunnable"):
        if why in row:
            part = re.search(r"wrap the part of it that writes text: (\S+),", row[why])
            instead = f"; instead: `{part[1]})`" if part else ""
            return [name, row["verdict"], "", short(row[why]) + instead, "", ""]
    if row["no_op"].startswith(
        "refused"
    ):  # by the model's check of itself, at the first hooked run
        return [name, row["verdict"], "", short(row["no_op"].removeprefix("refused: ")), "", ""]
    heads = row["heads"]
    attending = f"{sum(n > 0 for n in heads)} of {len(heads)}"
    off = [f"{WORDS[check]}: {short(row[check])}" for check in CHECKS if row[check] != "exact"]
    residual = "adds up" if row["residual"] == "exact" else short(row["residual"])
    return [
        name,
        row["verdict"],
        attending,
        "; ".join(off) or "exact",
        residual,
        short(read("token_maps")["types"].get(row["type"], {}).get("token_map", "")),
    ]


def mapped() -> dict[str, dict[str, Any]]:
    """The rows of the types that are served and have a token map."""
    served = {name for name, row in read()["types"].items() if row["verdict"] == "served"}
    rows = read("token_maps")["types"]
    had = {n: row for n, row in rows.items() if row["token_map"].startswith(("closed", "probed"))}
    return {name: row for name, row in had.items() if name in served}


def token_maps() -> str:
    """Of each token map how many painted cells are right, and what is counted on it."""
    table = [MAP_HEAD]
    for name, row in mapped().items():
        cells = row["cells"]
        painted = [str(cells), ""]
        if isinstance(cells, dict):
            pairs = (("right", "cells"), ("shifted_right", "shifted"))
            painted = [f"{cells[right]} of {cells[tried]}" for right, tried in pairs]
        checks = [short(row[check]) for check in ("ram", "answer")]
        table.append([f"`{name}`", row["token_map"], str(row["tokens"]), *painted, *checks])
    return markdown(table)


def sounds() -> str:
    """Of each type that was built with its feature extractor whether spans name what hears them."""
    rows = read("token_maps")["types"]
    heard = [[f"`{name}`", short(row["spans"])] for name, row in rows.items() if row.get("spans")]
    return markdown(
        [["type", "spans whose own tokens move, of the map and of the shifted map"], *heard]
    )


def probing() -> str:
    """What it costs to measure the cells of a picture of a thousand tokens."""
    cost = read("token_maps")["probing"]
    head = ["type", "picture", "tokens", "calls of the tower", "pictures a call", "CPU seconds"]
    width, height = cost["size"]
    row = [f"`{cost['type']}`", f"{width} × {height}", str(cost["tokens"]), str(cost["calls"]),
           str(cost["pictures"]), f"{cost['seconds']:.0f}"]  # fmt: skip
    return markdown([head, row])


def refused() -> str:
    """Each type that is refused, why, and what can be done with it."""
    table = [["type", "why", "what can be done"]]
    for name, row in read()["types"].items():
        if row["verdict"] == "refused":
            message = row.get("refused") or row["no_op"].removeprefix("refused: ")
            do = message.split(" to do: ")[-1].replace("|", "/")
            table.append([f"`{name}`", short(message), do])
    return markdown(table)


def short(text: str) -> str:
    """A reason up to where an error goes on with what was expected, safe in a table."""
    text = (
        text.split(" expected: ")[0]
        .split("to the residual stream: ")[-1]
        .split(" and a norm; ")[-1]
    )
    return text.replace("|", "/").replace("<", "&lt;")[:220]


TABLES = {
    table.__name__: table
    for table in (families, all_families, family_counts, token_maps, probing, sounds, refused)
}
