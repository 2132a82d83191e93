"""How a model answered: log-probabilities of the gold answers, and the answers themselves."""

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corelens.viz import page, style

SHOWN = 10  # answers in a notebook's table


def answer_histogram(evaluation: Any, ax: Axes | None = None) -> Figure:
    """Log-probabilities of the gold answers, those answered right beside those answered wrong.

    Args:
        evaluation: an Evaluation.
    """
    values = evaluation.logprobs
    right = evaluation.correct.astype(bool)
    with style.axes(ax, 4.4, 2.6) as ax:
        # the sides differ in colour and in hatching: print may be grey
        bins = np.histogram_bin_edges(values, bins=min(30, max(5, len(values) // 4)))
        ax.hist(
            [values[right], values[~right]], bins=list(bins), stacked=True,
            color=[style.BLUE, style.HOT],
            label=[f"right ({right.sum()})", f"wrong ({(~right).sum()})"], hatch=["", "//"],
            edgecolor="white",
            linewidth=0.5,
        )  # fmt: skip
        ax.set(xlabel="log-probability of the gold answer (nats)", ylabel="samples")
        ax.set_title(f"accuracy {evaluation.interval}", fontsize=9)
        ax.legend()
    return style.figure_of(ax)


def answers_html(evaluation: Any) -> Markup:
    """Accuracy, and a table of the first answers (the wrong ones, if there are any)."""
    wrong = [answer for answer in evaluation.per_sample if not answer.correct]
    listed = (wrong or evaluation.per_sample)[:SHOWN]
    which = "wrong answers" if wrong else "answers"
    of = len(wrong) if wrong else len(evaluation.per_sample)
    table = page.table(
        ["sample", "gold", "given", "log-probability (nats)"],
        [
            [answer.id, answer.gold, answer.given or "(nothing)", f"{answer.logprob:.2f}"]
            for answer in listed
        ],
        f"The first {len(listed)} of {of} {which}.",
    )
    words = (
        "accuracy **{}** (95% CI over {} samples), log-probability of the gold answer {:.3f} nats"
    )
    return (
        page.text(
            words.format(evaluation.interval, len(evaluation.per_sample), evaluation.answer_logprob)
        )
        + table
    )
