"""The command `corelens patch`: which heads or positions carry what differs between pictures and
their twins."""

import inspect
import json as json_module
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.shared import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Fresh,
    Json,
    Model,
    Open,
    check_model,
    ending,
    open_data,
    open_model,
    show_page,
    write_picture,
)
from corelens.errors import CorelensError
from corelens.heads.disk import write_whole

TURN = 3  # how far a drawn world's twin counts the asked digit on
BLIND = ("blur", "mask", "noise")
METRICS = ("logit_diff", "answer_logprob", "kl", "accuracy")


def add_patch(app: typer.Typer) -> None:
    """Give the command line its `patch`."""

    @app.command()
    def patch(
        model: Model,
        data: Data,
        twin: Annotated[
            str | None,
            typer.Option(
                help="What becomes of the region: blur, mask, noise, replace (by the next sample's region); or the "
                "twins themselves, a world or folder in the same order. [default: the same scenes with another answer "
                "where the world draws them ('refer:turn=3'), else blur]",
                show_default=False,
            ),
        ] = None,
        site: Annotated[
            str, typer.Option(help="z, q, v, attn_out, mlp_out, resid_pre, resid_post … or visual.")
        ] = "z",
        per: Annotated[
            str | None,
            typer.Option(
                help="The axes: layer, head, kv_head, position (one sample), role, region; 'layer,head'. [default: "
                "layer and head where the site has heads; else layer and position of one sample, roles of several]",
                show_default=False,
            ),
        ] = None,
        metric: Annotated[
            str | None,
            typer.Option(
                help=f"One of {', '.join(METRICS)}. [default: the first that the twins' answers allow]"
            ),
        ] = None,
        direction: Annotated[
            str, typer.Option(help="denoising (clean into corrupted) or noising.")
        ] = "denoising",
        attribution: Annotated[
            bool,
            typer.Option(
                "--attribution",
                help="Estimate all patches by gradients: two forwards, one backward.",
            ),
        ] = False,
        n: Annotated[int, typer.Option(help="How many samples.", min=1)] = 16,
        seed: Fresh = 2,
        batch_size: BatchSize = 8,
        dtype: Dtype = "auto",
        device: Device = None,
        top: Annotated[
            int, typer.Option(help="How many of the largest effects to list.", min=1)
        ] = 10,
        out: Annotated[
            Path | None,
            typer.Option(
                help="patch.html, a picture (png, pdf, svg, jpg), or patch.safetensors: all of it."
            ),
        ] = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """Put values of one run into the other, place by place: which heads carry what the pictures
        differ in.

        Each sample has a twin whose picture differs in its region alone, on the same token grid.
        `denoising` puts clean values into the twin's run.

        Example: `corelens patch qwen3vl-s refer --out heads.html`

        Example: `corelens patch qwen3vl-s refer --site resid_pre --n 1 --out where.png`

        Example: `corelens patch Qwen/Qwen3-VL-4B-Instruct my_samples --twin blur --attribution`
        """
        if metric is not None and metric not in METRICS:
            raise CorelensError(f"--metric {metric}", f"one of {', '.join(METRICS)}", "choose one")
        axes = _axes(site, per, n)
        if (
            out is not None
            and ending(out, "safetensors") != "safetensors"
            and not 1 <= len(axes) <= 2
        ):
            raise CorelensError(
                f"a picture of {len(axes)} axes", "one or two", "--per layer,head, or .safetensors"
            )
        check_model(model)
        samples = open_data(data, n, seed)[:n]
        hooked = open_model(model, dtype, device)
        kind, twins = _twins(hooked, samples, twin, data, n, seed)
        metric = metric or _metric(samples, twins)
        result = _patched(
            hooked, samples, twins, axes, metric, attribution, batch_size, not json, site, direction
        )
        result.meta |= {
            "model": model,
            "data": data,
            "twin": kind,
            "samples": len(samples),
            "seed": seed,
        }
        rows = _rows(result, top, _tokens(hooked, samples) if "position" in result.axes else [])
        if out is not None:
            _write(result, out, hooked, samples, twins, rows)
            show_page(out, open_page)
        if json:
            found = [labels | {"effect": effect} for labels, effect in result.top(top)]
            told = {
                "base": float(result.base.mean()),
                "other": float(result.other.mean()),
                "axes": result.axes,
            }
            typer.echo(
                json_module.dumps(
                    result.meta | told | {"effect": result.effect.mean(0).tolist(), "top": found}
                )
            )
            return
        table = Table(COLUMNS[0])
        for name in COLUMNS[1:]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console = Console(highlight=False, markup=False)
        console.print(_said(result), soft_wrap=True)
        console.print(table)
        if out is not None:
            console.print(f"written: {out}", soft_wrap=True)


def _axes(site: str, per: str | None, n: int) -> tuple[str, ...]:
    """The axes to sweep; of several samples never positions, which mean another token in each."""
    from corelens.interventions.sites import ALIASES, SITES, WHOLE

    place = "position" if n == 1 else "role"
    if per is None:
        if ALIASES.get(site, site) in WHOLE:
            return (place,)
        extra = SITES[site][1] if site in SITES else None
        return "layer", extra if extra in ("head", "kv_head") else place
    axes = tuple(word.strip() for word in per.split(",") if word.strip())
    if "position" in axes and n > 1:
        raise CorelensError(
            f"--per {per} on {n} samples, in each of which a position is another token",
            "one sample, or roles of tokens",
            "--n 1, or --per layer,role",
        )
    return axes


def _twins(
    model: Any, samples: Any, twin: str | None, data: str, n: int, seed: int
) -> tuple[str, Any]:
    """What was done, and each sample's twin."""
    from corelens.data import load_data
    from corelens.data.public import split_options
    from corelens.data.synthetic import WORLDS
    from corelens.interventions.counterfactuals import counterfactual_pairs

    if twin is None:
        world, options = split_options(data)
        drawn = world in WORLDS and not Path(data).exists()
        if (
            drawn
            and "turn" in inspect.signature(WORLDS[world]).parameters
            and "turn" not in options
        ):
            made = counterfactual_pairs(samples, load_data(data, n, seed, turn=TURN), model=model)
            return f"{data}, turn={TURN}", [b for _, b in made]
        twin = "blur"
    if twin in BLIND:
        made = counterfactual_pairs(samples, twin, model=model)
    elif twin == "replace":
        others = [_next(samples, number) for number in range(len(samples))]
        made = counterfactual_pairs(samples, "replace", other=others, model=model)
    else:
        made = counterfactual_pairs(samples, open_data(twin, n, seed)[:n], model=model)
    return twin, [b for _, b in made]


def _next(samples: Any, number: int) -> Any:
    """The next sample with another answer."""
    mine = samples[number]
    for other in [*samples[number + 1 :], *samples[:number]]:
        if other.answer != mine.answer and other.regions:
            return other
    raise CorelensError(
        f"no sample whose answer differs from {mine.answer!r}",
        "samples with several answers",
        "raise --n",
    )


def _metric(samples: Any, twins: Any) -> str:
    """Logit difference if every twin has another answer; else the log-probability of the sample's
    own."""
    answers = [(sample.answer, twin.answer) for sample, twin in zip(samples, twins, strict=True)]
    return (
        "logit_diff"
        if all(None not in pair and pair[0] != pair[1] for pair in answers)
        else "answer_logprob"
    )


def _patched(
    model: Any, samples: Any, twins: Any, axes: tuple[str, ...], metric: str, attribution: bool, batch_size: int,
    progress: bool, site: str, direction: str,
) -> Any:  # fmt: skip
    """One PatchResult over all pairs; a batch of them at a time, for memory grows with it."""
    import numpy as np

    from corelens.interventions import activation_patch, attribution_patch, metrics
    from corelens.interventions.result import PatchResult

    forced = metric in ("answer_logprob", "accuracy") and all(
        sample.answer is not None for sample in samples
    )
    if forced:  # the clean answer's tokens, of whatever number, behind both prompts
        twins = [
            replace(twin, answer=sample.answer) for sample, twin in zip(samples, twins, strict=True)
        ]
    options: dict[str, Any] = {
        "site": site,
        "per": axes,
        "direction": direction,
        "metric": getattr(metrics, metric)(),
    }
    if "role" in axes:
        options["positions"] = ["region", "visual", "question", "last"][
            not all(s.regions for s in samples) :
        ]
    found = []
    for start in range(0, len(samples), batch_size):
        both = [
            model.prepare(some[start : start + batch_size], answer=forced)
            for some in (samples, twins)
        ]
        if attribution:
            found.append(attribution_patch(model, both[0], both[1], **options))
        else:
            found.append(activation_patch(model, both[0], both[1], progress=progress, **options))
    values, base, other = (
        np.concatenate([getattr(one, of) for one in found]) for of in ("values", "base", "other")
    )
    names = [name for one in found for name in one.samples]
    return PatchResult(values, base, other, found[0].axes, names, found[0].meta)


COLUMNS = ("where", "effect [95% CI]", "of the difference")


def _rows(result: Any, top: int, tokens: list[str]) -> list[list[str]]:
    """The largest effects, each with its interval over samples and as a share of what the two runs
    differ by."""
    from corelens.heads.intervals import mean_interval

    gap, found = float((result.other - result.base).mean()), []
    for labels, effect in result.top(top):
        each = result.select(**labels).effect
        interval = mean_interval(each)
        spread = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if len(each) > 1 else ""
        found.append(
            [
                _place(labels, tokens),
                f"{effect:+.2f}{spread}",
                f"{effect / gap:.0%}" if gap else "–",
            ]
        )
    return found


def _place(labels: dict[str, str], tokens: list[str]) -> str:
    if set(labels) == {"layer", "head"}:
        return f"L{labels['layer']}H{labels['head']}"
    words = {name: f"{name} {label}" for name, label in labels.items()}
    if "role" in labels:
        words["role"] = labels["role"]
    if "position" in labels:
        words["position"] += f" {tokens[int(labels['position'])]}"
    return ", ".join(words.values()) or "all at once"


def _tokens(model: Any, samples: Any) -> list[str]:
    """What stands at each position of a sample: "(patch)", or the token in quotes."""
    inputs = _inputs(model, samples)
    patches = set(inputs.token_maps[0].visual.tolist())
    return [
        "(patch)" if at in patches else f"‘{word}’"
        for at, word in enumerate(model.to_str_tokens(inputs))
    ]


def _inputs(model: Any, samples: Any) -> Any:
    return model.prepare(samples, answer=all(sample.answer is not None for sample in samples))


def _said(result: Any) -> str:
    runs = (
        ("corrupted", "clean")
        if result.meta["direction"] == "denoising"
        else ("clean", "corrupted")
    )
    return (
        f"{result.meta['method']}, {result.meta['direction']}, {result.meta['site']}; {result.meta['metric']}: "
        f"{runs[0]} run {result.base.mean():.2f}, {runs[1]} run {result.other.mean():.2f} "
        f"({len(result.base)} pair{'s' * (len(result.base) > 1)}, twin: {result.meta['twin']})"
    )


def _write(
    result: Any, out: Path, model: Any, samples: Any, twins: Any, rows: list[list[str]]
) -> None:
    from corelens.viz import page as p
    from corelens.viz.patch_effects import patch_heatmap
    from corelens.viz.view import image_html

    if out.suffix.lower() == ".safetensors":
        result.save(out)
        return
    if "position" in result.axes:
        inputs = _inputs(model, samples)
        figure = patch_heatmap(result, inputs, tokens=model.to_str_tokens(inputs))
    else:
        figure = patch_heatmap(result)
    if out.suffix.lower() != ".html":
        write_picture(figure, out)
        return
    grid = _heads_html(result)
    caption = "Hover a head for its effect and its interval." if grid else "The mean over samples."
    drawn = p.figure(p.html(grid or image_html(figure, _said(result))), caption)
    shown = [
        p.pictures(
            [(None, _pairs(samples, twins))], "The first pairs: a sample, and its twin.", columns=4
        )
    ]
    table = p.table(
        COLUMNS, rows, "The largest effects, with 95% bootstrap intervals over samples."
    )
    title = f"Patching {result.meta['site']}"
    write_whole(
        out, p.page(title, [p.section("", drawn, table, *shown)], result.meta, _said(result))
    )


def _heads_html(result: Any) -> str:
    """Heads as an interactive grid, the interval of each on hover; empty for other axes."""
    from corelens.heads.scores import HeadScores
    from corelens.viz.head_grids import head_grid_html

    if list(result.axes) != ["layer", "head"]:
        return ""
    meta = {
        "key": f"effect of {result.meta['direction']} {result.meta['site']}",
        "unit": result.meta["metric"],
    }
    return head_grid_html(HeadScores(per_sample=result.effect, meta=meta))


def _pairs(samples: Any, twins: Any) -> list[tuple[Any, str]]:
    """The first two samples beside their twins, with their answers."""
    from corelens.viz.sample import shown

    found = []
    for sample, twin in list(zip(samples, twins, strict=True))[:2]:
        for one, name in ((sample, sample.question or "a chat"), (twin, "its twin")):
            found.append(
                (shown(one)[0][1], f"{name} → {one.answer}" if one.answer is not None else name)
            )
    return found
