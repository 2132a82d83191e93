"""The log of a training as a picture, for its card.

`python -m training.curve qwen3vl-m` draws that of a bundled model again, into its folder.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from corelens.demo import checkpoint, read_card
from corelens.viz import style

CURVE = "training.png"
_FORMS = {
    "dense": ("dense labels", style.GREY),
    "caption": ("captions", style.GOLD),
    "questions": ("questions", style.BLUE),
}
_NEAR = 9  # batches under the running median


def training_curve(log: Sequence[Mapping[str, Any]], checks: Sequence[str] = ()) -> Figure:
    """Above the loss of each batch in the log by what it asked for (mean cross-entropy of a word of
    the answer, or of a visual token summed over its dense labels, in nats; lines: the median of
    nine neighbours). Below the accuracy on validation scenes: their mean, and each check where the
    log has as many. It falls where harder checks join.

    Args:
        log: the lines of `train_log.jsonl`.
        checks: what the checks that the log ends with are called.
    """
    with plt.rc_context(style.RC):
        figure, (above, below) = plt.subplots(
            2, 1, sharex=True, figsize=(7.2, 4.4), height_ratios=(3, 2), layout="constrained"
        )
        plt.close(figure)
        for form, (label, colour) in _FORMS.items():
            points = np.array(
                [(line["step"], line["loss"]) for line in log if line["form"] == form]
            ).reshape(-1, 2)
            above.plot(*points.T, ".", color=colour, alpha=0.35, markersize=3)
            pauses = 1 + np.flatnonzero(np.diff(points[:, 0]) > log[-1]["step"] / 15)
            for part in np.split(points, pauses):
                near = [
                    np.median(part[max(0, i - _NEAR // 2) : i + _NEAR // 2 + 1, 1])
                    for i in range(len(part))
                ]
                (drawn,) = above.plot(part[:, 0], near, color=colour, linewidth=1.3)
            if len(points):
                drawn.set_label(label)
        above.set(yscale="log", ylabel="loss (nats)")
        judged = [line for line in log if line["form"] == "validation"]
        for i, name in enumerate(checks if len(checks) > 1 else ()):
            same = [line for line in judged if len(line.get("each", ())) == len(checks)]
            look = {
                "color": style.CYCLE[i % len(style.CYCLE)],
                "marker": style.MARKERS[i % len(style.MARKERS)],
            }
            values = [line["each"][i] for line in same]
            below.plot(
                [line["step"] for line in same],
                values,
                linewidth=0.9,
                markersize=4,
                label=name,
                **look,
            )
        below.plot(
            [line["step"] for line in judged],
            [line["accuracy"] for line in judged],
            ".-",
            color=style.INK,
            label="mean" if len(checks) > 1 else checks[0] if checks else "accuracy",
        )
        below.set(xlabel="step", ylabel="validation scenes right")
        below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for ax in (above, below):
            ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.4)
    return figure


def save_curve(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the log in a checkpoint's folder, as PNG beside it; `rows`: what was held out, as on the
    card."""
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    figure = training_curve(log, [_called(row) for row in rows if row["split"] == "validation"])
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        folder / CURVE, optimize=True
    )
    return folder / CURVE


def _called(row: Mapping[str, Any]) -> str:
    """A check's world and what sets it apart."""
    options = row.get("options", {}).items()
    return " ".join([row["world"], *(f"{key}={value}" for key, value in options if key != "sides")])


if __name__ == "__main__":
    print(save_curve(checkpoint(sys.argv[1]), read_card(sys.argv[1])["held_out"]))
