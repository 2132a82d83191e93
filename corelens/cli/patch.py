"""The command `corelens patch`: which heads or positions carry what differs between pictures and
their twins."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.opening import check_model, open_data, open_model
from corelens.cli.options import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Fresh,
    Json,
    Limit,
    Model,
    Open,
    Run,
    check_word,
)
from corelens.cli.output import ending, show_page, write_picture
from corelens.cli.twins import axes_of, check_site, metric_of, patched, twin_data, twins_of
from corelens.disk.write import write_whole
from corelens.errors import CorelensError

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
                help="What becomes of the region: blur, mask, noise, replace (by the next sample's "
                "region); or the twins themselves, a world or folder in the same order. [default: "
                "the same scenes with another answer where the world draws them ('refer:turn=3'), "
                "else blur]",
                show_default=False,
            ),
        ] = None,
        site: Annotated[
            str, typer.Option(help="z, q, v, attn_out, mlp_out, resid_pre, resid_post … or visual.")
        ] = "z",
        per: Annotated[
            str | None,
            typer.Option(
                help="The axes: layer, head, kv_head, position (one sample), role, region; "
                "'layer,head'. [default: layer and head where the site has heads; else layer and "
                "position of one sample, roles of several]",
                show_default=False,
            ),
        ] = None,
        metric: Annotated[
            str | None,
            typer.Option(
                help=f"One of {', '.join(METRICS)}. [default: the first that the twins' answers "
                "allow]"
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
        limit: Limit = None,
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
        run: Run = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """Put values of one run into the other, place by place: which heads carry what the pictures
        differ in.

        Each sample has a twin whose picture differs in its region alone, on the same token grid.
        `denoising` puts clean values into the twin's run.

        Example: `corelens patch qwen3vl-qs refer --out heads.html`

        Example: `corelens patch qwen3vl-qs refer --site resid_pre --n 1 --out where.png`

        Example: `corelens patch Qwen/Qwen3-VL-4B-Instruct my_samples --twin blur --attribution`
        """
        if metric is not None:
            check_word("--metric", metric, METRICS)
        check_word("--direction", direction, ("denoising", "noising"))
        check_site(site)
        axes = axes_of(site, per, min(n, limit or n))
        if (
            out is not None
            and ending(out, "safetensors") != "safetensors"
            and not 1 <= len(axes) <= 2
        ):
            raise CorelensError(
                f"a picture of {len(axes)} axes", "one or two", "--per layer,head, or .safetensors"
            )
        check_model(model)
        samples = open_data(data, n, seed, limit)[:n]
        twin_data(twin, n, seed)
        hooked = open_model(model, dtype, device)
        kind, twins = twins_of(hooked, samples, twin, data, n, seed)
        metric = metric or metric_of(samples, twins)
        result = patched(
            hooked, samples, twins, axes, metric, attribution, batch_size, not json, site,
            direction, run,
        )  # fmt: skip
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
            numbers = {
                "base": float(result.base.mean()),
                "other": float(result.other.mean()),
                "axes": result.axes,
                "effect": result.effect.mean(0).tolist(),
                "top": [labels | {"effect": effect} for labels, effect in result.top(top)],
            }
            typer.echo(json_module.dumps(result.meta | numbers))
            return
        table = Table(COLUMNS[0])
        for name in COLUMNS[1:]:
            table.add_column(escape(name), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console = Console(highlight=False, markup=False)
        console.print(_in_words(result), soft_wrap=True)
        console.print(table)
        if out is not None:
            console.print(f"written: {out}", soft_wrap=True)


COLUMNS = ("where", "effect [95% CI]", "of the difference")


def _rows(result: Any, top: int, tokens: list[str]) -> list[list[str]]:
    """The largest effects, each with its interval over samples and as a share of what the two runs
    differ by."""
    from corelens.heads.intervals import mean_interval

    gap, rows = float((result.other - result.base).mean()), []
    for labels, effect in result.top(top):
        effects = result.select(**labels).effect
        interval = mean_interval(effects)
        spread = f" [{interval.low:+.2f}, {interval.high:+.2f}]" if len(effects) > 1 else ""
        rows.append(
            [
                _place(labels, tokens),
                f"{effect:+.2f}{spread}",
                f"{effect / gap:.0%}" if gap else "–",
            ]
        )
    return rows


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
        "(patch)" if position in patches else f"‘{word}’"
        for position, word in enumerate(model.to_str_tokens(inputs))
    ]


def _inputs(model: Any, samples: Any) -> Any:
    return model.prepare(samples, answer=all(sample.answer is not None for sample in samples))


def _in_words(result: Any) -> str:
    runs = (
        ("corrupted", "clean")
        if result.meta["direction"] == "denoising"
        else ("clean", "corrupted")
    )
    return (
        f"{result.meta['method']}, {result.meta['direction']}, {result.meta['site']}; "
        f"{result.meta['metric']}: {runs[0]} run {result.base.mean():.2f}, {runs[1]} run "
        f"{result.other.mean():.2f} ({len(result.base)} pair{'s' * (len(result.base) > 1)}, twin: "
        f"{result.meta['twin']})"
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
    effects_figure = p.figure(p.html(grid or image_html(figure, _in_words(result))), caption)
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
        out,
        p.page(
            title, [p.section("", effects_figure, table, *shown)], result.meta, _in_words(result)
        ),
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

    pairs = []
    for sample, twin in list(zip(samples, twins, strict=True))[:2]:
        for half, name in ((sample, sample.question or "a chat"), (twin, "its twin")):
            words = name if half.answer is None else f"{name} → {half.answer}"
            pairs.append((shown(half)[0][1], words))
    return pairs
