"""What a sparse plan leaves, counted before it runs, and what must be said of a comparison with
it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.sparse.inference import SparseInference
from corelens.sparse.patterns import Pruned, Streaming

# rows of a user's own pattern that are looked at; longer prompts are counted on as many, evenly
# spaced
COUNTED = 512


def left_pairs(sparse: SparseInference, cfg: Any, tokens: Sequence[int]) -> float | None:
    """The share of causal (query, key) pairs of all heads that the plan leaves over prompts of
    these lengths.

    None where the pattern chooses as it runs. A model's own sliding windows are not counted.
    """
    plan = sparse.plan(cfg)
    left = whole = 0.0
    for length in tokens:
        every = length * (length + 1) / 2
        for layer, n_heads in enumerate(cfg.heads):
            if not n_heads:
                continue
            full = int(plan.full[layer].sum())
            pattern = plan.pattern(layer)
            sparse_heads = torch.from_numpy(~plan.full[layer, :n_heads]).nonzero()[:, 0]
            seen = (
                every
                if pattern is None or full == n_heads
                else _seen(pattern, length, sparse_heads)
            )
            if seen is None:
                return None
            left += full * every + (n_heads - full) * seen
            whole += n_heads * every
    return left / whole


def streaming_for(
    tokens: Sequence[int], sink: int | None, window: int | None, last: int = 0
) -> Streaming:
    """A window that suits prompts of these lengths, where none is given: a quarter of the shortest,
    at most 1,024.

    The sink is then 1/32 of it, at most 128.
    """
    shortest = min(tokens)
    sink = max(1, min(128, shortest // 32)) if sink is None else sink
    return Streaming(sink, max(1, min(1024, shortest // 4)) if window is None else window, last)


def leaves_something(sparse: SparseInference, cfg: Any, tokens: Sequence[int]) -> None:
    """Refuse a plan that leaves nothing out of prompts of these lengths: there would be nothing to
    time.

    Raises:
        CorelensError: such a plan.
    """
    budget = sparse.kv_budget
    cuts_cache = budget is not None and max(tokens) > budget.budget
    if left_pairs(sparse, cfg, tokens) == 1 and not cuts_cache and sparse.decode == "full":
        what = f"a budget of {budget.budget} keys" if budget is not None else f"{sparse.pattern}"
        raise CorelensError(
            f"{what} over prompts of {min(tokens)} to {max(tokens)} tokens: nothing is left out",
            "sink + window less than the prompts, and heads that are not full",
            "give a smaller --window and --sink (or --kv-budget), a smaller --top, or longer "
            "prompts",
        )


def _seen(pattern: Any, length: int, heads: Int[torch.Tensor, " some"]) -> float | None:
    """How many pairs one of these sparse heads sees of a prompt without padding, on the mean."""
    rows = np.arange(length)
    if isinstance(pattern, Pruned):
        return 0.0
    if isinstance(pattern, Streaming):
        seen = np.minimum(rows + 1, pattern.sink + pattern.window)
        last = length - min(pattern.last, length)
        return float(seen[:last].sum() + (rows[last:] + 1).sum())
    if hasattr(pattern, "sees"):
        return None
    looked = torch.from_numpy(
        np.unique(np.linspace(0, length - 1, min(length, COUNTED)).round())
    ).long()
    keys = torch.arange(length)[None, None, None]
    sample, positions = torch.zeros(1, 1, 1, 1, dtype=torch.long), looked[None, None, :, None]
    mask = pattern(sample, heads[None, :, None, None], positions, keys) & (keys <= positions)
    return float(mask.sum()) / mask.shape[1] / float((looked + 1).sum()) * length * (length + 1) / 2


def described(sparse: SparseInference) -> dict[str, Any]:
    """What is left out, as JSON."""
    plan: dict[str, Any] = {"heads": [list(head) for head in sparse.heads or ()]}
    plan |= {"pattern": _words(sparse.pattern), "decode": sparse.decode, "engine": sparse.engine}
    plan["kv_budget"] = _words(sparse.kv_budget)
    if sparse.layers:
        plan["layers"] = {str(layer): _words(pattern) for layer, pattern in sparse.layers.items()}
    return plan


def _words(part: Any) -> str | None:
    if part is None:
        return None
    name = type(part).__name__
    if isinstance(part, Pruned):
        return "Pruned(z = mean)" if part.mean_z is not None else "Pruned(z = 0)"
    if not hasattr(part, "__dict__") or (callable(part) and not hasattr(part, "sees")):
        return getattr(part, "__name__", name)
    shown = {
        key: value.label if isinstance(value, HeadScores) else value
        for key, value in vars(part).items()
    }
    simple = [
        f"{key}={value}" for key, value in shown.items() if isinstance(value, (int, float, str))
    ]
    return f"{name}({', '.join(simple)})"


def remarks(sparse: SparseInference, cfg: Any, inputs: Sequence[Any]) -> list[str]:
    """What must be said of a comparison with this plan, which has run, on these batches of prompts.

    Args:
        inputs: batches with token maps.
    """
    plan, sentences = sparse.plan(cfg), []
    maps = [token_map for batch in inputs for token_map in batch.token_maps]
    patterns = {layer: plan.pattern(layer) for layer in range(cfg.n_layers)}
    patterns = {layer: pattern for layer, pattern in patterns.items() if pattern is not None}
    full, longest = int(plan.full.sum()), max(len(token_map.all) for token_map in maps)
    if patterns and full == sum(cfg.heads):
        sentences.append(
            "All heads are full: the prefill leaves nothing out, and is the dense one."
        )
    elif patterns and full == 0:
        sentences.append(
            "No head is full: this measures what the pattern alone costs, and says nothing of "
            "which heads matter."
        )
    streams = [pattern for pattern in patterns.values() if isinstance(pattern, Streaming)]
    if streams and all(pattern.sink + pattern.window >= longest for pattern in streams):
        sentences.append(
            f"Sink and window cover the longest prompt ({longest} tokens): the pattern leaves "
            "nothing out."
        )
    last = max((pattern.last for pattern in streams), default=0)
    if last:
        covers = [
            tm for tm in maps if "question" in tm.parts and tm.stop - last <= int(tm.question.max())
        ]
        which = (
            f"The last {last} rows of the prompt, which see everything in every head, cover "
            f"question tokens in {len(covers)} of {len(maps)} samples"
            if covers
            else f"The last {last} rows of the prompt see everything in every head, the row that "
            "predicts the answer among them"
        )
        sentences.append(
            f"{which}: any head can fetch the evidence there, so this says little about which "
            "heads are full."
        )
    budget = sparse.kv_budget
    if budget is not None and budget.budget >= longest:
        sentences.append(
            f"The KV budget covers the longest prompt ({longest} tokens): nothing is evicted."
        )
    if "reference" in sparse.ran:
        sentences.append(
            "The reference engine makes the whole pattern: it is right, and its times say nothing "
            "of sparsity."
        )
    return sentences
