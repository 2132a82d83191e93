"""How a type's token map is had, whether it is right, and what is counted on it: a row of the table
of token maps.

A picture goes through the type's image processor and tower. The map is checked by painting cells
(`painted`), RAM by transformers' own attention weights, the answer's log-probability by a plain
forward.
"""

import time
from typing import Any

import torch
import transformers

import corelens as cl
from corelens.errors import CorelensError
from corelens.layouts.base import Layout
from families.checks import EXACT, Subject, eager_weights, raised, reason
from families.painted import SIZE, Painted, painted, sample_of, smooth
from families.processors import IMAGE, WHOLE, PlainProcessor, takes_pictures, with_processor
from families.shrink import TYPES, build, randomised, tiny_config

CLOSE = 5e-5
PROBED = (
    "vipllava"  # a type without a layout, whose picture has as many tokens as its tower patches
)


def map_of(model_type: str) -> dict[str, Any]:
    """How the map is had, of how many painted cells it is right, and RAM and an answer on it."""
    row: dict[str, Any] = {"type": model_type}
    if not takes_pictures(model_type):
        return row | {"token_map": "none: no picture with tokens of its own in the prompt"}
    try:
        hf, processor = with_processor(model_type, build)
        model = cl.HookedMLLM(hf, processor, check=False)
        row["processor"] = type(processor.image_processor).__name__
        row["whole_processor"] = model_type in WHOLE
        inputs = model.prepare(sample_of())
        row |= {"tokens": len(inputs.token_maps[0].images[0]), "size": list(SIZE)}
    except CorelensError as error:
        return row | {"token_map": f"none: {reason(error)}"}
    except Exception as error:
        return row | {"token_map": f"none: {raised(error)}"}
    row["token_map"] = how(model, inputs.tensors)
    for check in (cells, ram, answer):
        try:
            row[check.__name__] = check(model)
        except CorelensError as error:
            row[check.__name__] = f"refused: {reason(error)}"
        except Exception as error:
            row[check.__name__] = f"raised: {raised(error)}"
    return row


def how(model: Any, tensors: dict[str, Any]) -> str:
    """Where the cells come from."""
    if type(model.layout) is not Layout:
        return "closed form, of its layout"
    return "closed form, from image_grid_thw" if "image_grid_thw" in tensors else "probed"


def cells(model: Any) -> dict[str, int]:
    """Painted cells whose own token moved most, of the map, and of the map shifted by one cell."""
    result: Painted = painted(model)
    return vars(result)


def ram(model: Any) -> str:
    """RAM on a region is what the model's own attention weights say, of the question's rows."""
    sample = sample_of()
    values = torch.from_numpy(cl.score_heads(model, [sample], ["ram"])["ram"].values)
    attends = torch.tensor(
        [[head < n for head in range(model.cfg.n_heads)] for n in model.cfg.heads]
    )
    if values.shape != attends.shape or not torch.equal(values.isfinite(), attends):
        return f"of shape {tuple(values.shape)}, or finite elsewhere than where heads are"
    inputs = model.prepare(sample)
    with torch.no_grad():
        plain = model.hf(**inputs.tensors, use_cache=False).logits
        try:
            weights = eager_weights(Subject(model, inputs.tensors, plain))
        except Exception:
            return "finite; the plain model does not run under eager attention"
    question, region = inputs.token_maps[0].question, inputs.token_maps[0].region
    off, compared = 0.0, 0
    for layer, candidates in weights.items():
        heads = model.cfg.heads[layer]
        shape = (1, heads, inputs.length, inputs.length)
        whole = [w[0] for w in candidates if w.shape == shape]
        summed = [w[:, question][:, :, region].sum(-1).mean(-1) for w in whole]
        if heads and summed:
            off = max(off, min(float((x - values[layer, :heads]).abs().max()) for x in summed))
            compared += 1
    if not compared:
        return "finite; its layers give no weights under eager attention"
    return EXACT if off < CLOSE else f"off by {off:.1e}"


def answer(model: Any) -> str:
    """`evaluate` gives the gold answer the log-probability that a plain forward gives it."""
    evaluation = cl.evaluate(model, [sample_of()])
    inputs = model.prepare(sample_of(), answer=True)
    positions = inputs.token_maps[0].answer
    gold = inputs.tensors["input_ids"][0, positions]
    with torch.no_grad():
        logits = model.hf(**inputs.tensors, use_cache=False).logits[0, positions - 1]
    wanted = float(logits.float().log_softmax(-1).gather(1, gold[:, None]).sum())
    off = abs(evaluation.answer_logprob - wanted)
    return EXACT if off < 1e-3 else f"off by {off:.1e}"


def cost_of_probing(side: int = 448) -> dict[str, Any]:
    """What it costs to measure the cells of a square picture of a thousand tokens, once a size."""
    config = tiny_config(PROBED)
    config.vision_config.image_size = side
    hf = randomised(getattr(transformers, TYPES[PROBED])(config))
    model = cl.HookedMLLM(hf, PlainProcessor(PROBED, hf), check=False)
    batches: list[int] = []
    tower = hf.model.vision_tower
    model.processor([IMAGE], images=[[smooth((side, side))]])  # (counts its tokens)
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len((args or list(kwargs.values()))[0])),
        with_kwargs=True,
    )
    begun = time.process_time()
    token_map = model.prepare(cl.Sample([smooth((side, side))], "What is it?")).token_maps[0]
    seconds, calls = time.process_time() - begun, len(batches)
    handle.remove()
    return {
        "type": PROBED, "size": [side, side], "tokens": len(token_map.images[0]), "calls": calls,
        "pictures": max(batches), "seconds": round(seconds, 1),
    }  # fmt: skip
