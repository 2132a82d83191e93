"""The page on one head: what `corelens.evaluation.profile` found out about it."""

from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from corelens.heads.scores import HeadSet
from corelens.viz import page as p
from corelens.viz import style
from corelens.viz.head_grids import head_grid_html

if TYPE_CHECKING:
    from corelens.evaluation.profile import HeadProfile

COLOURS = (style.HOT, style.GOLD, style.BLUE, style.GREY, "#bfc3c7")
ABLATIONS = {
    "zero": "zero: its output z := 0",
    "mean": "mean: z := its mean over these samples",
    "knockout": "knockout: the region out of its sight",
}


def profile_figure(profile: "HeadProfile") -> Figure:
    """Left: its rank among all heads. Right: what it attends to in every sample, the best
    first."""
    scores = next(iter(profile.scores.values()))
    values = np.sort(scores.values.ravel())[::-1]
    rank = profile.rank(next(iter(profile.scores)))
    with style.axes(None, 8.6, 2.9) as first:
        figure = style.figure_of(first)
        first.remove()
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        left.plot(np.arange(1, len(values) + 1), values, color=style.GREY, linewidth=1.2)
        left.plot(rank, values[rank - 1], "o", color=style.HOT, markersize=6)
        left.annotate(
            f"{profile.head}, rank {rank}",
            (rank, values[rank - 1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=style.HOT,
            fontsize=8.5,
        )
        left.set(xlabel="heads, from the highest to the lowest", ylabel=style.axis_label(scores))
        left.set_title(style.words(scores)[2], fontsize=8.5, fontweight="normal", color=style.SOFT)
        bottom = np.zeros(len(profile.samples))
        columns = np.arange(1, len(bottom) + 1)
        for (name, mass), colour in zip(profile.masses.items(), COLOURS, strict=True):
            height = mass[profile.order]
            right.bar(
                columns,
                height,
                1,
                bottom=bottom,
                color=colour,
                label=f"{name} {mass.mean():.2f}",
                linewidth=0,
            )
            bottom += height
        right.set(
            xlabel="samples, best first",
            ylabel="attention mass",
            xlim=(0.5, len(bottom) + 0.5),
            ylim=(0, 1.02),
        )
        right.legend(
            title="part, mean", loc="center left", bbox_to_anchor=(1, 0.5), title_fontsize=8.5
        )
    return figure


def profile_page(profile: "HeadProfile") -> str:
    """One offline HTML document."""
    meta = {**profile.meta, "samples": len(profile.samples)}
    subtitle = f"{_rows(profile)}, {len(profile.samples)} samples"
    return p.page(f"Head {profile.head}", _sections(profile), meta, subtitle)


def profile_html(profile: "HeadProfile") -> str:
    """The same parts for a notebook, without the page's frame."""
    from corelens.viz.view import image_html

    picture = image_html(profile.plot(), repr(profile))
    return f"<h3>Head {profile.head}</h3>{picture}{_scores(profile)}{_lost(profile)}"


def _sections(profile: "HeadProfile") -> list[p.Section]:
    key, scores = next(iter(profile.scores.items()))
    name, unit, _ = style.words(scores)
    region = profile.masses["region"]
    numbers = [
        (f"{name} ({unit})", f"{scores.values[profile.head]:.2f}", _ci(scores, profile.head)),
        ("rank among all heads", f"{profile.rank(key)}", f"of {scores.values.size}"),
        (
            "attention on the region",
            f"{region.mean():.2f}",
            f"from {region.min():.2f} to {region.max():.2f}",
        ),
    ]
    if "mean" in profile.ablations:
        lost = profile.ablations["mean"].logprob_lost
        numbers.append(
            ("lost without it (mean ablation)", f"{lost.value:.2f} nats", f"95% CI {_range(lost)}")
        )
    looks = list(profile.looks)
    half = max(1, len(looks) // 2)
    rows = [
        ("Best: most on the region", looks[:half]),
        ("Worst: least on the region", looks[half:]),
    ]
    return [
        p.section("", p.tiles(numbers, hot=0)),
        p.section(
            "Its scores",
            _scores(profile),
            p.figure(
                Markup(head_grid_html(scores, HeadSet(profile.head))),
                f"{name} of every head; {profile.head} outlined. Hover a head for its number and "
                "interval.",
            ),
        ),
        p.section(
            "What it attends to",
            p.figure(
                profile_figure(profile),
                "Left: its rank among all heads. Right: its attention in each sample "
                f"({_rows(profile)}), split over the parts of the prompt.",
            ),
            p.pictures(
                [
                    (words, [(profile.looks[number], _caption(profile, number)) for number in of])
                    for words, of in rows
                    if of
                ],
                "Its best and worst samples by attention on the outlined region: chosen for that, "
                "not typical. One scale for all of them.",
            ),
        ),
        *([p.section("What it does", _lost(profile))] if profile.ablations else []),
    ]


def _scores(profile: "HeadProfile") -> Markup:
    rows = []
    for key, scores in profile.scores.items():
        layer = sorted(scores.values[profile.head.layer], reverse=True)
        interval = _ci(scores, profile.head, "[{:.3f}, {:.3f}]")
        value = f"{scores.values[profile.head]:.3f} {interval}".strip()
        rank = layer.index(scores.values[profile.head]) + 1
        rows.append(
            [key, value, style.words(scores)[1], profile.rank(key), f"{rank} of {len(layer)}"]
        )
    columns = ["score", f"of {profile.head}", "unit", "rank in the model", "rank in its layer"]
    return p.table(columns, rows, "Scores, with 95% intervals over the samples that were scored.")


def _lost(profile: "HeadProfile") -> Markup:
    if profile.clean is None:
        return Markup("")
    rows = [["nothing", _interval(profile.clean.interval), "", ""]]
    rows += [
        [
            ABLATIONS[kind],
            _interval(cost.accuracy),
            _interval(cost.lost),
            _interval(cost.logprob_lost),
        ]
        for kind, cost in profile.ablations.items()
    ]
    columns = [
        "ablated: this head alone",
        "accuracy",
        "accuracy lost",
        "log-probability lost (nats)",
    ]
    return p.table(
        columns, rows,
        f"What {len(profile.samples)} samples lose without {profile.head}; 95% intervals over "
        "samples (accuracy: Clopper–Pearson; lost: Newcombe; log-probability: bootstrap). Other "
        "heads may take over: a head that costs nothing alone may matter in a group.",
    )  # fmt: skip


def _caption(profile: "HeadProfile", number: int) -> str:
    sample = profile.samples[number]
    return (
        f"{sample.question or sample.id} **{sample.answer or ''}** region "
        f"{profile.masses['region'][number]:.2f}"
    )


def _rows(profile: "HeadProfile") -> str:
    rows = profile.meta["rows"]
    return "the last row" if rows == "last" else f"{profile.meta['reduce']} over {rows} rows"


def _ci(scores: Any, head: Any, form: str = "95% CI {:.2f} to {:.2f}") -> str:
    if scores.per_sample is None or len(scores.per_sample) < 2:
        return ""
    low, high = scores.ci()
    return form.format(low[head], high[head])


def _interval(x: Any) -> str:
    value, low, high = (round(end, 3) + 0.0 for end in x)  # (+ 0.0: no "-0.000")
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _range(x: Any) -> str:
    return f"{round(x.low, 2) + 0.0:.2f} to {round(x.high, 2) + 0.0:.2f}"
