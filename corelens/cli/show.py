"""The command `corelens show`: the user's own picture and question, the model's answer, and where
its heads look."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from corelens.cli.opening import check_model, named_heads, open_model, open_scores
from corelens.cli.options import Device, Dtype, Open, check_word
from corelens.cli.output import ending, show_page, write_picture
from corelens.demo import DEFAULT
from corelens.disk.write import write_whole
from corelens.errors import CorelensError

NAMES = ("last", "question", "template", "text")


def add_show(app: typer.Typer) -> None:
    """Give the command line its `show`."""

    @app.command()
    def show(
        image: Annotated[Path, typer.Argument(help="Your picture.", callback=_there)],
        question: Annotated[str, typer.Argument(help="Your question about it.")],
        model: Annotated[
            str, typer.Option(help="A bundled model, a folder, or a name on the Hub.")
        ] = DEFAULT,
        heads: Annotated[str | None, typer.Option(help="Which heads to show: 'L3H5,L4H1'.")] = None,
        scores: Annotated[
            Path | None, typer.Option(help="A run folder of `corelens score`: its top heads.")
        ] = None,
        box: Annotated[
            str | None, typer.Option(help="Where the evidence is, in pixels: x0,y0,x1,y1.")
        ] = None,
        top: Annotated[int, typer.Option(help="How many heads.", min=1, max=24)] = 6,
        rows: Annotated[
            str, typer.Option(help="Whose attention: last, question, or last+question.")
        ] = "last",
        smooth: Annotated[bool, typer.Option("--smooth", help="Blur the patches' edges.")] = False,
        out: Annotated[
            Path, typer.Option(help="show.html, or a picture: png, pdf, svg, jpg.")
        ] = Path("show.html"),
        dtype: Dtype = "auto",
        device: Device = None,
        open_page: Open = False,
        json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    ) -> None:
        """Ask about a picture of your own: the answer, and the heads that look at it.

        Heads are those of --heads, else the top ones of --scores, else those that put most on --box
        in this picture, else (a bundled model) the top ones by RAM over 40 scenes of its world,
        else those that put most on the picture.

        Example: `corelens show scene.png "What digit is on the red star?" --box 20,51,77,105`

        Example: `corelens show bus.jpg "What number?" --model Qwen/Qwen3-VL-4B-Instruct --out
        bus.png`
        """
        from corelens.inputs.pictures import read_picture
        from corelens.inputs.prepare import Sample

        ending(out)
        for name in rows.split("+"):
            check_word("--rows", name.strip(), NAMES)
        regions = [] if box is None else [_box(box)]
        sample = Sample(
            [read_picture(image, "the picture")], question, regions=regions, id=image.name
        )
        ranking = open_scores(scores, None) if scores is not None else None
        named = named_heads(heads)
        check_model(
            model,
            *([named] if named is not None else []),
            *([ranking.top(1.0)] if ranking is not None else []),
        )
        hooked = open_model(model, dtype, device)
        shown, ranked, values = _heads(hooked, model, sample, named, ranking, top, rows)
        answer, probability = _answer(hooked, sample)
        about = {
            "answer": f"{answer} (probability of its first token {probability:.2f})",
            "model": model,
            "heads": ranked,
        }
        _write(hooked, sample, shown, rows, smooth, out, about)
        show_page(out, open_page)
        if json:
            numbers = {
                "question": question,
                "answer": answer,
                "probability": probability,
                "heads": values,
                "ranked_by": ranked,
                "rows": rows,
                "out": str(out),
            }
            typer.echo(json_module.dumps(numbers))
            return
        console = Console()
        console.print(
            f"answer: {answer}   (probability of its first token {probability:.2f})", markup=False
        )
        console.print(
            f"heads, {ranked}: {', '.join(map(str, shown))}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        console.print(f"written: {out}", highlight=False, markup=False, soft_wrap=True)


def _there(image: Path) -> Path:
    """Before anything else is asked for: a picture that is not there has no question."""
    from corelens.inputs.pictures import check_file

    check_file(image, "the picture")
    return image


def _box(words: str) -> Any:
    from corelens.tokens.regions import Box

    try:
        x0, y0, x1, y1 = (float(number) for number in words.split(","))
    except ValueError:
        raise CorelensError(
            f"--box {words!r}",
            "four numbers x0,y0,x1,y1 in pixels of the picture",
            "for instance --box 20,51,77,105",
        ) from None
    return Box(x0, y0, x1, y1)


def _heads(
    hooked: Any, name: str, sample: Any, heads: Any, scores: Any, top: int, rows: str
) -> tuple[Any, str, dict[str, float | None]]:
    """The heads to show, how they were ranked, and {head: score}."""
    from corelens.data.synthetic import synthetic
    from corelens.demo import list_demos, read_card
    from corelens.metrics import metric
    from corelens.metrics.score import score_heads

    if heads is not None:
        heads.check(hooked.cfg.n_layers, hooked.cfg.n_heads)
        return heads, "as given", {str(head): None for head in heads}
    over = "this picture alone"
    if scores is not None:
        over = f"{len(scores.meta.get('samples') or []) or 'other'} samples"
    elif not sample.regions and name in list_demos():
        world = read_card(name)["training"]["worlds"][0]
        scores = _first(
            score_heads(hooked, synthetic(world, 40, seed=1), [metric("ram", rows=rows)])
        )
        over = f"40 scenes of {world!r}"
    else:
        by = "ram" if sample.regions else "visual_mass"
        scores = _first(score_heads(hooked, [sample], [metric(by, rows=rows)]))
    best = scores.top(k=min(top, len(scores.top(1.0))))
    best.check(hooked.cfg.n_layers, hooked.cfg.n_heads)
    values: dict[str, float | None] = {str(head): float(scores.values[head]) for head in best}
    return best, f"top by {scores.label} over {over}", values


def _first(scores: dict[str, Any]) -> Any:
    return next(iter(scores.values()))


def _answer(model: Any, sample: Any) -> tuple[str, float]:
    """What the model says, and the probability of the first token of it."""
    import torch

    inputs = model.prepare(sample)
    with torch.no_grad():
        first = float(model(inputs, logits_to_keep=1)[0, -1].float().softmax(-1).max())
    ids = model.generate(inputs, max_new_tokens=32, do_sample=False)[0]
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip(), first


def _write(
    model: Any, sample: Any, heads: Any, rows: str, smooth: bool, out: Path, about: dict[str, str]
) -> None:
    from corelens.explorer.explore import explore
    from corelens.viz import page as p
    from corelens.viz.overlays import head_pictures, overlay

    if out.suffix.lower() != ".html":
        write_picture(overlay(model, sample, heads, rows=rows, smooth=smooth), out)
        return
    pictures = head_pictures(model, sample, heads, rows=rows, smooth=smooth)
    caption = (
        f"Attention on the picture ({rows} rows), {about['heads']}. All heads share one scale; "
        "numbers are attention mass."
    )
    attention_pictures = p.pictures([(None, pictures)], caption, columns=4)
    meta = {
        "model": about["model"],
        "picture": sample.id,
        "heads": ", ".join(map(str, heads)),
        "rows": rows,
    }
    subtitle = f"The model says: {about['answer']}"
    explorer = explore(model, sample, heads=list(heads)[:3])
    sections = [
        p.section("", attention_pictures),
        p.section("Look yourself", p.wide(explorer.part())),
    ]
    write_whole(out, p.page(sample.question, sections, meta, subtitle))
