"""Heads of different lengths against dense attention under the same mask; what is kept against slow
loops over patterns."""

import gc
import inspect
import weakref
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Llama4TextConfig

from corelens import (
    CorelensError,
    HeadScores,
    HookedMLLM,
    KVBudget,
    Pruned,
    Sample,
    SparseInference,
    Streaming,
    knockout,
)
from corelens.hooks.rows import Call, rows_z
from corelens.inputs.prepare import Inputs
from corelens.sparse import ragged
from corelens.sparse.cache import RaggedCache, sliding_windows
from corelens.sparse.prompt import Prompt
from corelens.sparse.ragged import Ragged, grouped
from corelens.sparse.selection import among_heads, highest, observed, sink_and_window
from helpers.families import FAMILIES, tiny
from helpers.family_parts import randomise
from helpers.other_models import soft_capped, with_sinks
from helpers.samples import picture

WINDOW, BUDGET, NEW = 6, 16, 6
SAMPLES = [
    Sample(images=[picture(0, (96, 64))], question="Which colour?", answer="7"),
    Sample(
        images=[picture(1, (70, 110))],
        question="What digit is on the circle left of the blue star?",
        answer="2",
    ),
]
SCORES = HeadScores(np.random.default_rng(3).random((4, 4)) ** 3)


def call(heads: int = 8, sinks: bool = False, softcap: float | None = None) -> Call:
    return Call(
        torch.nn.Module(), None, 0.3, True, softcap, torch.randn(heads) if sinks else None, None
    )


# --- the store


def dense_step(
    store: dict, query: torch.Tensor, visible: torch.Tensor, arguments: Call
) -> torch.Tensor:
    """Attention of one row over all keys under a mask [batch, kv_head, key]."""
    group = query.shape[1] // visible.shape[1]
    mask = visible.repeat_interleave(group, dim=1)[:, :, None]
    arguments = Call(
        arguments.module,
        mask,
        arguments.scaling,
        False,
        arguments.softcap,
        arguments.sink_logits,
        None,
    )
    return rows_z(query, store["key"], store["value"], None, None, arguments)[0]


@pytest.mark.parametrize("variant", ["plain", "sinks", "softcap"])
@pytest.mark.parametrize(
    "limits", [(None,) * 4, (None, 11, 11, 0), (5, 5, 5, 5), (30, None, 30, None)]
)
def test_ragged_is_dense_under_the_same_mask(limits, variant):
    batch, heads, kv_heads, total, d, sink = 3, 8, 4, 20, 16, 2
    arguments = call(heads, variant == "sinks", 1.5 if variant == "softcap" else None)
    held = {name: torch.randn(batch, kv_heads, total, d) for name in ("key", "value")}
    keep = torch.rand(batch, kv_heads, total) < 0.4
    keep[..., :sink] = keep[..., -1] = True
    for kv, limit in enumerate(limits):
        if limit is not None:  # as sink_and_window leaves a ring
            positions = torch.arange(total)
            keep[:, kv] = ((positions < sink) | (positions >= total - (limit - sink))) & (limit > 0)
    store = Ragged(held["key"], held["value"], keep, limits, sink)
    visible = keep.clone()
    for step in range(ragged.SLACK + 9):  # past the room that is made at once
        new = {name: torch.randn(batch, kv_heads, 1, d) for name in held}
        held = {name: torch.cat([held[name], new[name]], dim=2) for name in held}
        store.append(new["key"], new["value"])
        visible = torch.nn.functional.pad(visible, (0, 1), value=True)
        for kv, limit in enumerate(limits):
            if limit is not None:
                positions = torch.arange(total + step + 1)
                visible[:, kv] &= (
                    (positions < sink) | (positions > total + step - (limit - sink))
                    if limit
                    else False
                )
        query = torch.randn(batch, heads, 1, d)
        z = store.attend(query, arguments)
        wanted = dense_step(held, query, visible, arguments)
        torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-5)
    key, value, on = store.dense()
    assert torch.equal(on, visible)
    assert torch.equal(key, held["key"].masked_fill(~visible[..., None], 0))
    assert torch.equal(value, held["value"].masked_fill(~visible[..., None], 0))
    positions = store.positions()
    for sample in range(batch):
        for kv in range(kv_heads):
            assert torch.equal(positions[sample][kv], visible[sample, kv].nonzero()[:, 0])


def test_equal_lengths_are_read_together():
    keep = torch.zeros(2, 4, 30, dtype=torch.bool)
    for kv, length in enumerate((5, 12, 5, 12)):
        keep[:, kv, -length:] = True
    store = Ragged(torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30, 8), keep, [None] * 4)
    assert [(group.count, group.length) for group in store.groups] == [(4, 5), (4, 12)]
    assert store.nbytes == 2 * int(keep.sum()) * 8 * 4


def test_varlen_is_called_for_what_grouped_reads(monkeypatch):
    """The kernel is CUDA's: here its documented contract stands in for it, one sequence of one
    query token a KV head."""

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux,
        scale,
        enable_gqa,
        seqused_k,
    ):
        assert enable_gqa and return_aux.lse and max_q == 1 and key.shape[1] == value.shape[1] == 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
        assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1 and int(cu_seq_k[-1]) == len(
            key
        )
        z, lse = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
        for n, (first, used) in enumerate(
            zip(cu_seq_k[:-1].tolist(), seqused_k.tolist(), strict=True)
        ):
            assert used <= max_k and first + used <= int(cu_seq_k[n + 1]) and int(cu_seq_q[n]) == n
            scores = query[n] @ key[first : first + used, 0].T * scale
            z[n], lse[:, n] = (
                scores.softmax(1) @ value[first : first + used, 0],
                scores.logsumexp(1),
            )
        return z, lse

    from torch.nn.attention import varlen

    assert (
        inspect.signature(varlen_attn).parameters.keys()
        <= inspect.signature(varlen.varlen_attn).parameters.keys()
    )
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    keep = torch.rand(2, 4, 30) < 0.5
    keep[..., -1] = True
    keep[:, 2] = torch.arange(30) > 20
    store = Ragged(
        torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30, 8), keep, [None, None, 9, None], 1
    )
    for _ in range(3):
        store.append(torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    query = torch.randn(8, 2, 8)
    for sinks in (None, torch.randn(8, 2)):
        z = ragged.varlen(store, query, call(), sinks)
        torch.testing.assert_close(z, grouped(store, query, call(), sinks), atol=1e-6, rtol=1e-5)


# --- what is kept


def slow_looked_at(
    pattern: torch.Tensor, first: int, kv: int, group: int, window: int
) -> list[float]:
    """SnapKV's score of every key before the window, from one sample's pattern [head, query,
    key]."""
    total = pattern.shape[1]
    rows = range(max(total - window, first), total)
    mean = [0.0] * total
    for key in range(first, total - window):
        seen = [
            float(pattern[head, row, key])
            for head in range(kv * group, (kv + 1) * group)
            for row in rows
        ]
        mean[key] = sum(seen) / len(seen)
    return [
        sum(mean[max(key - 2, 0) : min(key + 3, total - window)]) / 5
        for key in range(total - window)
    ]


def slow_selection(
    pattern: torch.Tensor, first: int, capacity: list[int], window: int
) -> list[set[int]]:
    total, group = pattern.shape[1], pattern.shape[0] // len(capacity)
    keep = []
    for kv, size in enumerate(capacity):
        score = slow_looked_at(pattern, first, kv, group, window)
        ranked = sorted(range(first, max(total - window, first)), key=lambda key: -score[key])
        keep.append(
            set(ranked[: max(size - window, 0)]) | set(range(max(total - window, first), total))
        )
    return keep


def masked_pattern(
    query: torch.Tensor, key: torch.Tensor, prompt: Prompt, arguments: Call
) -> tuple[torch.Tensor, Call]:
    """The whole pattern under causality and padding, and the call with that mask."""
    positions = torch.arange(key.shape[2])
    mask = (positions[None, :] <= positions[:, None])[None] & (
        positions[None, None] >= prompt.first[:, None, None]
    )
    arguments = Call(
        arguments.module, mask[:, None], arguments.scaling, False, None, arguments.sink_logits, None
    )
    return rows_z(query, key, key, None, None, arguments)[1], arguments


@pytest.mark.parametrize("sinks", [False, True])
def test_selection_is_the_slow_loop(sinks, monkeypatch):
    monkeypatch.setattr("corelens.sparse.selection.CHUNK_ELEMENTS", 1)  # one KV head at a time
    total, window = 40, 6
    query, key = torch.randn(4, 8, total, 16), torch.randn(4, 4, total, 16)
    prompt = Prompt(torch.tensor([0, 7, 20, 37]), torch.full((4,), total), total)
    pattern, arguments = masked_pattern(query, key, prompt, call(8, sinks))
    looked_at = observed(query, key, arguments, prompt, window)
    capacity = torch.tensor([[6, 10, 20, 40], [8, 8, 33, 7], [6, 7, 8, 10], [3, 3, 3, 3]])
    keep = highest(looked_at, prompt, capacity, window)
    for sample in range(4):
        first = int(prompt.first[sample])
        wanted = slow_selection(pattern[sample], first, capacity[sample].tolist(), window)
        assert [set(line.nonzero()[:, 0].tolist()) for line in keep[sample]] == wanted
    assert torch.equal(keep.sum(2), capacity)


def test_adakv_moves_keys_to_the_heads_that_look_most():
    looked_at = torch.rand(3, 4, 50) * torch.tensor([1.0, 0.1, 3.0, 0.5])[:, None]
    looked_at[1, :, :20] = looked_at[2, :, :46] = -torch.inf
    capacity, window, alpha = torch.full((3, 4), 14), 4, 0.2
    capacities = among_heads(looked_at, capacity, window, alpha)
    for sample in range(2):
        pairs = [(float(looked_at[sample, kv, key]), kv) for kv in range(4) for key in range(50)]
        best = [kv for _, kv in sorted(pairs, reverse=True)[:40]]
        assert capacities[sample].tolist() == [
            round(best.count(kv) * 0.8 + 0.2 * 10) + window for kv in range(4)
        ]
        assert int(capacities[sample].min()) >= int(alpha * 10) + window
    keep = highest(
        looked_at, Prompt(torch.tensor([0, 20, 46]), torch.full((3,), 54), 54), capacities, window
    )[2]
    assert (keep[:, 46:] == True).all() and not keep[:, :46].any()  # noqa: E712 (a prompt of 8: all of it)


def test_sink_and_window_count_real_tokens():
    prompt = Prompt(torch.tensor([0, 6]), torch.tensor([12, 12]), 12)
    keep = sink_and_window(prompt, 12, ["full", "sparse", "pruned"], 2, 3)
    positions = [[line.nonzero()[:, 0].tolist() for line in sample] for sample in keep]
    assert positions == [
        [list(range(12)), [0, 1, 9, 10, 11], []],
        [list(range(6, 12)), [6, 7, 9, 10, 11], []],
    ]


# --- generation


@cache
def hooked(family: str) -> tuple[HookedMLLM, Inputs]:
    if family in ("softcap", "sinks"):
        model = HookedMLLM(randomise(soft_capped() if family == "softcap" else with_sinks()))
        ids = torch.randint(1, 60, (2, 40), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        return model, model.inputs(input_ids=ids, attention_mask=mask)
    model = HookedMLLM(*tiny(family))
    return model, model.prepare(SAMPLES)


def generated(model, inputs, sparse=None, hooks=(), **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens, and the logits of every step."""
    logits = []
    hooks = [("hook_logits", lambda x, hook: logits.append(x[:, -1].clone())), *hooks]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    with model.sparse(sparse) if sparse else nullcontext(), model.hooks(hooks):
        return model.generate(inputs, **options), torch.stack(logits, dim=1)


def masked_reference(model, inputs, visible, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense model with a full cache, its scores masked at decode steps.

    visible(layer, pattern, sample, kv_head, position) → the columns of the row at that position,
    from the prompt's pattern [head, query, key] of that layer and sample; None: all.
    """
    patterns: dict[int, torch.Tensor] = {}

    def mask(layer):
        def hook_function(scores, hook):
            if scores.shape[2] == 1:
                for sample in range(scores.shape[0]):
                    for head in range(scores.shape[1]):
                        kv, last = (
                            head * model.cfg.n_kv_heads // scores.shape[1],
                            scores.shape[3] - 1,
                        )
                        columns = visible(layer, patterns[layer][sample], sample, kv, last)
                        if columns is not None:
                            hidden = torch.ones(scores.shape[3], dtype=torch.bool)
                            hidden[sorted(columns)] = False
                            scores[sample, head, 0, hidden] = -torch.inf
                return scores

        return hook_function

    def note(layer):
        return lambda x, hook: patterns.__setitem__(layer, x.clone()) if x.shape[2] > 1 else None

    hooks = [(f"blocks.{n}.attn.hook_attn_scores", mask(n)) for n in range(model.cfg.n_layers)]
    hooks += [(f"blocks.{n}.attn.hook_pattern", note(n)) for n in range(model.cfg.n_layers)]
    return generated(model, inputs, hooks=hooks, **options)


def unbounded_layers(model) -> list[int]:
    layers = DynamicCache(config=model.hf.config.get_text_config()).layers
    return [number for number, layer in enumerate(layers) if not layer.is_sliding]


def budgeted_reference(model, inputs, budget: KVBudget):
    cfg, mask = model.cfg, inputs.tensors["attention_mask"]
    layers, length = unbounded_layers(model), mask.shape[1]
    capacities = [
        budget.capacities(cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, n, layers)
        for n in mask.sum(1).tolist()
    ]

    @cache
    def selected(layer, sample):
        pattern, first = patterns[layer, sample], length - int(mask[sample].sum())
        return slow_selection(pattern, first, capacities[sample][layer].tolist(), budget.window)

    patterns: dict[tuple[int, int], torch.Tensor] = {}

    def visible(layer, pattern, sample, kv, position):
        if layer not in layers:
            return None
        patterns[layer, sample] = pattern
        return selected(layer, sample)[kv] | set(range(length, position + 1))

    return masked_reference(model, inputs, visible)


@pytest.mark.parametrize("family", [*FAMILIES, "softcap", "sinks"])
def test_a_budget_decodes_as_the_masked_reference(family):
    """Over families, a batch padded on the left: the tokens, and the logits of every step."""
    model, inputs = hooked(family)
    budget = KVBudget(SCORES, BUDGET, window=WINDOW)
    ids, logits = generated(model, inputs, SparseInference(kv_budget=budget))
    wanted, reference = budgeted_reference(model, inputs, budget)
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, wanted)
    dense = generated(model, inputs)[1]
    torch.testing.assert_close(logits[:, 0], dense[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[:, 1:], dense[:, 1:], atol=1e-3)


@pytest.mark.parametrize("allocation", ["random", "pyramidkv"])
def test_other_allocations(allocation):
    model, inputs = hooked("qwen3_vl")
    budget = KVBudget(
        SCORES if allocation == "random" else None, BUDGET, window=WINDOW, allocation=allocation
    )
    logits = generated(model, inputs, SparseInference(kv_budget=budget))[1]
    torch.testing.assert_close(
        logits, budgeted_reference(model, inputs, budget)[1], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "softcap", "sinks"])
def test_streaming_goes_on_evicting(family):
    model, inputs = hooked(family)
    sink, window = 3, 4
    sparse = SparseInference([(0, 0), (2, 3)], Streaming(sink, window), decode="streaming")
    ids, logits = generated(model, inputs, sparse, max_new_tokens=14, min_new_tokens=14)
    firsts = (inputs.tensors["attention_mask"] == 0).sum(1).tolist()

    def visible(layer, pattern, sample, kv, position):
        if (layer, kv) in ((0, 0), (2, 1)) or layer not in unbounded_layers(model):
            return None
        return set(range(firsts[sample], firsts[sample] + sink)) | set(
            range(position - window + 1, position + 1)
        )

    # the prompt goes through the pattern too: the reference decodes on the keys and values that
    # this leaves
    with model.sparse(
        SparseInference([(0, 0), (2, 3)], Streaming(sink, window), engine="reference")
    ):
        wanted, reference = masked_reference(
            model, inputs, visible, max_new_tokens=14, min_new_tokens=14
        )
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, wanted)


def test_a_sample_alone_and_in_a_batch():
    model, inputs = hooked("qwen3_vl")
    sparse = SparseInference(kv_budget=KVBudget(SCORES, BUDGET, window=WINDOW))
    together = generated(model, inputs, sparse)[1]
    for index, sample in enumerate(SAMPLES):
        alone = generated(model, model.prepare(sample), sparse)[1]
        torch.testing.assert_close(together[index], alone[0], atol=1e-5, rtol=1e-5)


def test_hooks_speak_of_original_positions():
    model, inputs = hooked("qwen3_vl")
    sparse = SparseInference(kv_budget=KVBudget(SCORES, BUDGET, window=WINDOW))
    length, seen, edited = inputs.tensors["input_ids"].shape[1], [], []
    cut = ("blocks.2.attn.head.1.hook_pattern", lambda x, hook: edited.append(x.clone()))
    name = "blocks.2.attn.hook_pattern"
    plain = generated(model, inputs, sparse)[1]
    looked = generated(
        model, inputs, sparse, [(name, lambda x, hook: seen.append(x.clone())), cut]
    )[1]
    torch.testing.assert_close(looked, plain, atol=1e-5, rtol=1e-5)
    assert [x.shape[2:] for x in seen] == [(length, length)] + [
        (1, length + n) for n in range(1, NEW)
    ]
    keep = slow_selection(seen[0][1], int((inputs.tensors["attention_mask"][1] == 0).sum()),
                          KVBudget(SCORES, BUDGET, window=WINDOW).capacities(4, 4, 2, length)[2].tolist(), WINDOW)  # fmt: skip
    for head in range(4):
        held = set(seen[1][1, head, 0].nonzero()[:, 0].tolist())
        assert held == keep[head // 2] | {length}
    assert torch.equal(edited[1], seen[1][:, 1])
    silenced = [(f"blocks.{n}.attn.head.0.hook_z", lambda z, hook: z * 0) for n in range(4)]
    changed = generated(model, inputs, sparse, silenced)[1]
    assert not torch.allclose(changed[:, 1:], plain[:, 1:], atol=1e-3)


def test_keys_are_chosen_by_what_a_knockout_leaves_of_attention():
    model, inputs = hooked("qwen3_vl")
    budget, every = (
        KVBudget(SCORES, BUDGET, window=WINDOW),
        [(layer, head) for layer in range(4) for head in range(4)],
    )
    plain = generated(model, inputs, SparseInference(kv_budget=budget))[1]
    with model.hooks(fwd_hooks=knockout(every, rows="all", columns="visual")):
        logits = generated(model, inputs, SparseInference(kv_budget=budget))[1]
        reference = budgeted_reference(model, inputs, budget)[1]
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, plain, atol=1e-3)


def test_sampling_works_and_beams_are_refused():
    model, inputs = hooked("qwen3_vl")
    sparse = SparseInference(kv_budget=KVBudget(SCORES, BUDGET, window=WINDOW))
    with model.sparse(sparse):
        ids = model.generate(
            inputs, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=2
        )
        assert ids.shape == (4, 4)
        with pytest.raises(CorelensError, match="num_beams"):
            model.generate(inputs, num_beams=2)


# --- memory


class FirstSteps(RaggedCache):
    """Notes what is held when the last layer has been evicted."""

    evicted = ()

    def evict(self, layer_idx, query, call):
        before = self.ragged[layer_idx].keys
        gone = weakref.ref(before.untyped_storage()), before.untyped_storage().nbytes()
        del before
        super().evict(layer_idx, query, call)
        self.evicted += (gone,)
        FirstSteps.last, FirstSteps.bytes = self, self.nbytes


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr("corelens.sparse.cache.RaggedCache", FirstSteps)
    return FirstSteps


@pytest.mark.parametrize("allocation", ["scores", "adakv"])
def test_bytes_are_the_budget_and_the_rest_is_freed(watched, allocation):
    model, inputs = hooked("qwen3_vl")
    inputs = model.prepare([SAMPLES[1], SAMPLES[1]])
    budget = KVBudget(
        SCORES if allocation == "scores" else None, 40, window=WINDOW, allocation=allocation
    )
    with model.sparse(SparseInference(kv_budget=budget)):
        model.generate(inputs, max_new_tokens=1)
        token_bytes = 2 * model.cfg.d_head * 4  # a key and a value in float32
        assert watched.bytes == pytest.approx(2 * 4 * 2 * 40 * token_bytes, rel=0.01)
        model.generate(inputs, max_new_tokens=3, min_new_tokens=3)
    cache = watched.last
    assert cache.get_seq_length() == inputs.tensors["input_ids"].shape[1] + 2
    room = ragged.SLACK
    assert watched.bytes < cache.nbytes <= watched.bytes + 2 * 4 * 2 * room * token_bytes
    gc.collect()
    assert all(storage() is None for storage, _ in cache.evicted)
    held = sum(
        x.untyped_storage().nbytes()
        for layer in cache.ragged
        for x in (layer.store.keys, layer.store.values)
    )
    assert held == cache.nbytes


# --- what is refused


def test_pruned_kv_heads_hold_nothing(watched):
    model, inputs = hooked("qwen3_vl")
    full = [(0, 0), (1, 2), (1, 3)]
    for options in (
        {"kv_budget": KVBudget(SCORES, BUDGET, window=WINDOW)},
        {"decode": "streaming"},
    ):
        pattern = {} if "kv_budget" in options else {3: Streaming(2, 4)}
        with model.sparse(SparseInference(full, Pruned(), layers=pattern, **options)):
            model.generate(inputs, max_new_tokens=2, min_new_tokens=2)
        cache, length = watched.last, inputs.tensors["input_ids"].shape[1]
        held = [[len(positions) for positions in cache.positions(layer)[1]] for layer in range(4)]
        real = length + 1 - int((inputs.tensors["attention_mask"][1] == 0).sum())
        if pattern:
            assert held == [[real, 0], [0, real], [0, 0], [2 + 4, 2 + 4]]
        else:
            sizes = KVBudget(SCORES, BUDGET, window=WINDOW).capacities(4, 4, 2, real - 1)
            assert held == [[sizes[0, 0] + 1, 0], [0, sizes[1, 1] + 1], [0, 0], [0, 0]]


def test_what_a_cache_cannot_do(watched):
    model, inputs = hooked("qwen3_vl")
    with model.sparse(SparseInference(kv_budget=KVBudget(SCORES, BUDGET, window=WINDOW))):
        model.generate(inputs, max_new_tokens=2, min_new_tokens=2)
        cache, new = watched.last, torch.zeros(2, 2, 2, model.cfg.d_head)
        with pytest.raises(CorelensError, match="2 tokens at once"):
            cache.update(new, new, 0)
        for refused in (
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            cache.reset,
        ):
            with pytest.raises(CorelensError, match="fresh cache"):
                refused()
        with pytest.raises(CorelensError, match="padded on the right"):
            model.generate(model.prepare(SAMPLES, padding_side="right"), max_new_tokens=2)
        with pytest.raises(CorelensError, match="last 2 tokens of a prompt in parts"):
            model.generate(
                inputs,
                max_new_tokens=2,
                prefill_chunk_size=inputs.tensors["input_ids"].shape[1] - 2,
            )
    with (
        model.sparse(SparseInference(kv_budget=KVBudget(HeadScores(np.ones((4, 8)))))),
        pytest.raises(CorelensError, match="4 layers × 4 heads"),
    ):
        model.generate(inputs, max_new_tokens=2)
    with pytest.raises(CorelensError, match="chunked_attention"):
        sliding_windows(Llama4TextConfig(num_hidden_layers=4))


def test_a_layer_that_was_not_evicted():
    model, _ = hooked("qwen3_vl")
    cache = RaggedCache(
        SparseInference(kv_budget=KVBudget(SCORES, BUDGET, window=WINDOW)).plan(model.cfg)
    )
    assert cache.get_seq_length() == cache.nbytes == 0
    key = torch.randn(1, 2, 5, 8)
    for _ in range(2):  # a prompt in two parts
        held, _ = cache.update(key, key, 0)
    assert held.shape[2] == cache.get_seq_length() == 10 and cache.nbytes == 2 * held.nbytes
    with pytest.raises(CorelensError, match="not evicted"):
        cache.attend(0, torch.randn(1, 4, 1, 8), call(4))
