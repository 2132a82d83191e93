"""What the models answer of scenes in another style, and whether the same heads matter there, from
benchmarks/results/shifts.json."""

from typing import Any

from markdown_tables import markdown
from measured import read

STYLES = {
    "none": "as trained", "noise": "noise (σ = 25 of 255)", "jpeg": "JPEG (quality 15)",
    "blur": "blurred (1.5 px)", "dark": "half as bright", "grey": "a third of the colour",
    "turned": "turned by 10°", "small": "at three quarters of the size",
    "photograph": "on a photograph", "paper": "on white paper", "which": "“Which” for “What”",
    "statement": "“The digit on … is”", "instruction": "an instruction behind the question",
    "sentence": "the answer is a sentence", "question-first": "the question before its picture",
    "named": "“Does it show …?”",
}  # fmt: skip


def shifts() -> str:
    """Accuracy in each style, and with the top heads masked; a column a model."""
    return _table(lambda x: f"{100 * x['accuracy']:.3g} ({100 * x['without_top']['accuracy']:.3g})")


def shifted_heads() -> str:
    """Of the top heads, the share that leads in each style, too; a column a model."""
    return _table(lambda x: f"{x['same_heads']:.2f}" if "same_heads" in x else "–")


def _table(cell: Any) -> str:
    models = read("shifts")["models"]
    rows = [["", *(f"`{name}`" for name in models)]]
    for style, words in STYLES.items():
        rows.append([words, *(cell(run["shifts"][style]) for run in models.values())])
    return markdown(rows)


TABLES = {"shifts": shifts, "shifted_heads": shifted_heads}
