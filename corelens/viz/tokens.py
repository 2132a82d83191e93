"""Attention between tokens, drawn by CircuitsVis; a picture's many patches are a few sums, so that
a page stays small.

CircuitsVis (github.com/TransformerLensOrg/CircuitsVis) embeds its script in `local_src`, which
needs no network; its `show_code()` and its notebook display load from elsewhere and are not used.
"""

from typing import Any

import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.scores import HeadSet
from corelens.tokens.token_map import TokenMap
from corelens.viz import style
from corelens.viz.view import View

MOST_NUMBERS = 250_000  # attention values on one page: about 2 MB beside the script's 1.3 MB
# CircuitsVis knows light pages only; where a notebook or a site is dark, white turns dark and blue
# stays blue
DARK = (
    '[data-jp-theme-light="false"] .cl-tokens,.vscode-dark '
    '.cl-tokens,[data-md-color-scheme="slate"] .cl-tokens'
    "{filter:invert(.915) hue-rotate(180deg)}"
)
LESS_THAN = "\ue000"  # stands for "<" until the page is whole (see `circuitsvis_html`)


def token_view(model: Any, sample: Any, heads: Any, rows: Any = "text") -> View:
    """How heads attend between the tokens of a prompt. Choose a head above; hover a cell for its
    number.

    Tokens of text stand for themselves. Of each picture (or each group of frames of a video) there
    are two sums: the tokens of the region, and the rest.

    Args:
        model: a HookedMLLM. sample: a Sample. heads: a HeadSet, or what makes one.
        rows: which tokens' attention is computed: "text" (default), "question+last", …; "all" also
            shows that of the patches (the mean over a sum's patches) at T² cost. Rows left out are
            empty.
    Returns:
        A View: a notebook shows it, `.save(path)` writes an offline page of 2 to 5 MB.
    """
    heads = HeadSet(heads).check(model.cfg.n_layers, model.cfg.n_heads)
    names, attention = segment_attention(model, model.prepare(sample), heads, rows)
    caption = (
        "Attention mass from each token (line) to each token (column), from the ground's colour "
        f"(0) to blue ({float(attention.max()):.2f}); a picture's patches are summed (region, "
        "rest). Hover a head to see it large, click to keep it."
    )
    return View("Attention between tokens", circuitsvis_html(attention, names, heads), caption)


def segment_attention(
    model: Any, inputs: Any, heads: HeadSet, rows: Any = "text"
) -> tuple[list[str], Float[Tensor, "head segment segment"]]:
    """Names of what the view has lines for, and each head's attention mass between them.

    Summed over keys, the mean over a line's rows; lines without a row among `rows` are 0.
    """
    token_map = inputs.token_maps[0]
    groups = segments(token_map, model.to_str_tokens(inputs))
    if not heads or len(heads) * len(groups) ** 2 > MOST_NUMBERS:
        raise CorelensError(
            f"{len(heads)} heads × {len(groups)} tokens × {len(groups)} tokens",
            f"one head or more, and at most {MOST_NUMBERS:,} numbers on a page",
            "name fewer heads" if heads else "name a head",
        )
    rows_at = token_map.positions(rows, rows=True)
    member = torch.zeros(len(groups), token_map.length)
    for line, (_, positions) in zip(member, groups, strict=True):
        line[positions] = 1
    layers, summed = heads.by_layer(), {}

    def look(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        layer = int(hook.name.split(".")[1])
        inside = member.to(pattern)
        of_rows = inside[:, rows_at.to(pattern.device)]  # [segment, row]
        mean = of_rows / of_rows.sum(1, keepdim=True).clamp(min=1)
        summed[layer] = (mean @ pattern[0, layers[layer]] @ inside.T).cpu()

    with torch.no_grad(), model.pattern_rows(rows_at.tolist()):
        hooks = [(f"blocks.{layer}.attn.hook_pattern_rows", look) for layer in layers]
        model.run_with_hooks(inputs, return_type=None, fwd_hooks=hooks)
    attention = torch.stack([summed[layer][layers[layer].index(number)] for layer, number in heads])
    return [name for name, _ in groups], attention


def segments(token_map: TokenMap, tokens: list[str]) -> list[tuple[str, list[int]]]:
    """(name, positions) of everything that is one line of the view, in the order of the prompt."""
    region = set(token_map.region.tolist()) if token_map.covered else set()
    parts_shown = [
        (tokens[position].replace("\n", "↵"), [position]) for position in token_map.text.tolist()
    ]
    for number, picture in enumerate(token_map.pictures or []):
        frames = (
            [()] * len(picture.positions)
            if picture.frames is None
            else list(map(tuple, picture.frames.tolist()))
        )
        for frame in dict.fromkeys(frames):
            here = [
                position
                for position, of in zip(picture.positions.tolist(), frames, strict=True)
                if of == frame
            ]
            shown = sorted({f for f in frame if f >= 0})
            name = f"image {number}" if not shown else f"frames {shown[0]}–{shown[-1]}"
            parts = (
                (f"[{name}: region]", region & set(here)),
                (f"[{name}: rest]" if region else f"[{name}]", set(here) - region),
            )
            parts_shown += [(name, sorted(part)) for name, part in parts if part]
    between = sorted(set(token_map.placeholder.tolist()) - set(token_map.visual.tolist()))
    parts_shown += [("[image separators]", between)] if between else []
    return sorted(parts_shown, key=lambda group: group[1][0])


def circuitsvis_html(
    attention: Float[Tensor, "head segment segment"], names: list[str], heads: HeadSet
) -> Markup:
    """CircuitsVis's element, its script within it; no name can end that script."""
    from circuitsvis.attention import attention_heads

    # CircuitsVis writes the tokens as JSON into a script, as they are: a token "</script>" would
    # end it. Each "<" goes in as a character of no meaning, and is an escape of JavaScript in the
    # page.
    escaped = [name.replace("<", LESS_THAN) for name in names]
    backwards = not bool(attention.triu(1).any())
    script = attention_heads(
        attention=[[[round(float(x), 3) for x in row] for row in head] for head in attention],
        tokens=escaped, attention_head_names=[str(head) for head in heads],
        positive_color=style.BLUE,
        max_value=float(attention.max()), min_value=0.0, mask_upper_tri=backwards,
    ).local_src.replace("\\ue000", "\\u003c")  # fmt: skip
    # (CircuitsVis leaves its own <div> open)
    return Markup(
        '<div class="cl-tokens" style="background:#fff;color:#22262b;padding:4px;overflow-x:auto">'
        "<style>{}</style>{}</div></div>"
    ).format(Markup(DARK), Markup(script))
