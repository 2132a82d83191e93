"""What the models answer of scenes in another style, and whether the same heads matter there, from
benchmarks/results/shifts.json."""

from typing import Any

from markdown_tables import markdown, paragraph
from measured import read

STYLES = {
    "none": "as trained", "noise": "noise (σ = 25 of 255)", "jpeg": "JPEG (quality 15)",
    "blur": "blurred (1.5 px)", "dark": "half as bright", "grey": "a third of the colour",
    "turned": "turned by 10°", "small": "at three quarters of the size",
    "photograph": "on a photograph", "paper": "on white paper", "which": "“Which” for “What”",
    "statement": "“The digit on … is”", "instruction": "an instruction after the question",
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
    easier = {"smol-vlm": " (one object)"}
    rows = [["", *(f"`{name}`{easier.get(name, '')}" for name in models)]]
    for style, words in STYLES.items():
        rows.append([words, *(cell(run["shifts"][style]) for run in models.values())])
    return markdown(rows)


def lost_to_style() -> str:
    """How much of the accuracy the harmless and the harmful styles cost."""

    def lost(style: str) -> list[int]:
        runs = read("shifts")["models"]
        shares = [run["shifts"] for name, run in runs.items() if name != "smol-vlm"]
        return sorted(round(100 * (x["none"]["accuracy"] - x[style]["accuracy"])) for x in shares)

    own = read("shifts")["models"]["smol-vlm"]["shifts"]
    used_to = round(100 * (own["none"]["accuracy"] - own["instruction"]["accuracy"]))
    ends = {style: f"{lost(style)[0]} to {lost(style)[-1]}" for style in STYLES}
    text = f"**Noise costs the models {ends['noise']} points and JPEG {ends['jpeg']}; a photograph "
    text += f"behind the shapes {ends['photograph']}. Blur costs {ends['blur']}, an instruction "
    text += f"after the question {ends['instruction']} (but {used_to} in `smol-vlm`, on scenes of "
    text += "one object, which was trained with some).** Those that read on the grid alone lose "
    text += "nearly all where the scene is turned or smaller. None was trained to answer in "
    return paragraph(text + "sentences, or whether a shape is there.")


TABLES = {"lost_to_style": lost_to_style, "shifts": shifts, "shifted_heads": shifted_heads}
