"""HookedMLLM against the wrapped model itself, and every edit against the slow, obvious way to make
it."""

import copy

import pytest
import torch
from torch import nn

from corelens.errors import CorelensError
from corelens.model.hooked import HookedMLLM
from helpers.families import tiny
from helpers.samples import sample


@pytest.fixture(scope="module")
def model() -> HookedMLLM:
    hf, processor = tiny("qwen3_vl")
    return HookedMLLM(hf, processor)


@pytest.fixture(scope="module")
def batch(model):
    return model.prepare([sample(0), sample(1, (128, 96), "Which colour?", images=2)])


def reference(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(**inputs.tensors, use_cache=False).logits


@torch.no_grad()
def test_without_hooks_it_is_the_wrapped_model_bit_for_bit(model, batch):
    assert torch.equal(model(batch), reference(model, batch))
    last = model.hf(**batch.tensors, use_cache=False, logits_to_keep=1).logits
    assert torch.equal(model(batch, logits_to_keep=1), last)
    torch.testing.assert_close(last, reference(model, batch)[:, -1:], atol=1e-5, rtol=0)
    assert model(batch, return_type=None) is None


@torch.no_grad()
def test_reading_everything_but_the_pattern_leaves_the_logits_bit_for_bit(model, batch):
    logits, cache = model.run_with_cache(batch)
    assert torch.equal(logits, reference(model, batch))
    rows = [
        "blocks.1.attn.hook_pattern_rows",
        "blocks.2.attn.head.3.hook_pattern_rows",
        "blocks.0.attn.hook_result",
    ]
    logits, _ = model.run_with_cache(batch, names_filter=rows)
    assert torch.equal(logits, reference(model, batch))
    c = model.cfg
    n, pos = batch.tensors["input_ids"].shape
    assert (
        cache["q", 1].shape
        == cache["rot_q", 1].shape
        == cache["z", 1].shape
        == (n, pos, c.n_heads, c.d_head)
    )
    assert cache["k", 1].shape == cache["v", 1].shape == (n, pos, c.n_kv_heads, c.d_head)
    assert not any(name.endswith(("pattern", "pattern_rows", "scores", "result")) for name in cache)


@torch.no_grad()
def test_hooked_pattern_is_eager_attention(model, batch):
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    logits, cache = model.run_with_cache(batch, names_filter=names)
    torch.testing.assert_close(logits, reference(model, batch), atol=1e-5, rtol=0)
    eager = copy.deepcopy(model.hf)
    eager.set_attn_implementation("eager")
    attentions = eager(**batch.tensors, output_attentions=True, use_cache=False).attentions
    real = torch.stack([token_map.real for token_map in batch.token_maps])
    for name, wanted in zip(names, attentions, strict=True):
        actual = cache[name]
        assert actual.dtype == torch.float32
        mask = real[:, None, :, None].expand_as(actual)
        torch.testing.assert_close(actual[mask], wanted[mask], atol=1e-6, rtol=0)


@torch.no_grad()
def test_rows_are_the_rows_of_the_pattern(model, batch):
    name = "blocks.2.attn.hook_pattern"
    seen = {}

    def keep(x, hook):
        seen["rows"], seen["which"] = x.clone(), hook.ctx["rows"]
        assert hook.ctx["inputs"] is batch
        assert hook.ctx["positions"].tolist() == list(range(batch.tensors["input_ids"].shape[1]))

    for spec in ("question", "last", "question+last+answer", [3, 20, 21]):
        with model.pattern_rows(spec):
            model.run_with_hooks(batch, fwd_hooks=[(name + "_rows", keep)])
            _, cache = model.run_with_cache(batch, names_filter=[name, name + "_rows"])
        torch.testing.assert_close(cache[name + "_rows"], seen["rows"], atol=1e-6, rtol=0)
        for i, rows in enumerate(seen["which"]):
            wanted = (
                batch.token_maps[i].positions(spec, rows=True)
                if isinstance(spec, str)
                else torch.tensor(spec)
            )
            assert rows[rows >= 0].tolist() == wanted.tolist()
            torch.testing.assert_close(
                seen["rows"][i][:, rows >= 0], cache[name][i][:, rows[rows >= 0]], atol=1e-6, rtol=0
            )
            assert (seen["rows"][i][:, rows < 0] == 0).all()


def zero(x, hook):
    return torch.zeros_like(x)


@torch.no_grad()
def test_zeroed_z_is_a_pre_hook_on_the_output_projection(model, batch):
    actual = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.head.2.hook_z", zero)])
    d = model.cfg.d_head

    def pre(module, args):
        x = args[0].clone()
        x[..., 2 * d : 3 * d] = 0
        return (x,)

    handle = (
        model.layout.decoder(model.hf).layers[1].self_attn.o_proj.register_forward_pre_hook(pre)
    )
    wanted = reference(model, batch)
    handle.remove()
    assert torch.equal(actual, wanted)
    assert not torch.equal(actual, reference(model, batch))


@torch.no_grad()
def test_an_edited_pattern_changes_z_as_the_closed_form_says(model, batch):
    generator = torch.Generator().manual_seed(1)
    made = {}

    def replace(x, hook):
        made["pattern"] = torch.rand(x.shape, generator=generator)
        return made["pattern"]

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", replace)]):
        _, cache = model.run_with_cache(
            batch, names_filter=["blocks.2.attn.hook_v", "blocks.2.attn.hook_z"]
        )
    v = cache["v", 2].repeat_interleave(model.cfg.n_heads // model.cfg.n_kv_heads, dim=2)
    wanted = torch.einsum("bhqk,bkhd->bqhd", made["pattern"], v)
    torch.testing.assert_close(cache["z", 2], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_written_rows_equal_the_same_rows_written_into_the_pattern(model, batch):
    def sharpen(x):
        return (x**2) / (x**2).sum(-1, keepdim=True).clamp(min=1e-9)

    def write_rows(x, hook):
        return sharpen(x)

    def write_pattern(x, hook):
        for i, token_map in enumerate(hook.ctx["inputs"].token_maps):
            x[i, :, token_map.question] = sharpen(x[i, :, token_map.question])

    a = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_pattern_rows", write_rows)])
    b = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_pattern", write_pattern)])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (a - reference(model, batch)).abs().max() > 1e-3

    def in_place(x, hook):
        x[:] = sharpen(x)

    c = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_pattern_rows", in_place)])
    assert torch.equal(a, c)
    with torch.inference_mode():
        d = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_pattern_rows", in_place)])
    assert torch.equal(a, d)


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, [0, 3]])
def test_edges_equal_edits_of_dense_scores(model, batch, heads):
    def cut(edges, hook):
        edges.cut(heads, "question", "region")
        edges.add(heads, "last", "visual", 2.5)

    def dense(x, hook):
        for i, token_map in enumerate(hook.ctx["inputs"].token_maps):
            for head in range(model.cfg.n_heads) if heads is None else heads:
                for row in token_map.question:
                    x[i, head, row, token_map.region] = -torch.inf
                x[i, head, token_map.last, token_map.visual] += 2.5

    plain = reference(model, batch)
    fast = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_edges", cut)])
    slow = model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_attn_scores", dense)])
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
    assert (fast - plain).abs().max() > 1e-3
    # the pattern and the rows show the edit
    for name in ("hook_pattern", "hook_pattern_rows"):
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_edges", cut)]):
            logits, cache = model.run_with_cache(batch, names_filter=f"blocks.1.attn.{name}")
        torch.testing.assert_close(logits, slow, atol=1e-5, rtol=0)
    rows = cache["blocks.1.attn.hook_pattern_rows"]
    cut_heads = list(range(model.cfg.n_heads)) if heads is None else heads
    assert (rows[0][cut_heads][..., batch.token_maps[0].region] == 0).all()
    if heads is not None:
        assert (rows[0][1][..., batch.token_maps[0].region] > 0).any()


@torch.no_grad()
def test_a_row_that_loses_every_edge_gives_zero_and_a_warning(model, batch):
    with (
        pytest.warns(UserWarning, match="lost every edge"),
        model.hooks(
            fwd_hooks=[
                ("blocks.1.attn.hook_edges", lambda edges, hook: edges.cut(None, "last", "all"))
            ]
        ),
    ):
        _, cache = model.run_with_cache(batch, names_filter="blocks.1.attn.hook_z")
    assert (cache["z", 1][0, batch.token_maps[0].last] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post",
     "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.0.hook_deepstack", "ln_final.hook_normalized",
     "blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.attn.hook_v", "blocks.1.attn.hook_rot_q",
     "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_z", "blocks.1.attn.hook_result", "blocks.1.mlp.hook_pre",
     "blocks.1.mlp.hook_post", "blocks.1.ln1.hook_normalized", "blocks.1.ln1.hook_scale", "blocks.1.ln2.hook_scale",
     "hook_logits", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_pattern_rows"],
)  # fmt: skip
def test_every_point_writes_and_later_readers_see_it(model, batch, name):
    """Returned and in-place edits agree, change the run, and a cache behind them holds what was
    written."""
    seen = []

    def scale(x, hook):
        return x * 1.5 + 0.1

    def scale_in_place(x, hook):
        x *= 1.5
        x += 0.1

    def keep(x, hook):
        seen.append(x.clone())

    plain = model(batch)
    returned = model.run_with_hooks(batch, fwd_hooks=[(name, scale), (name, keep)])
    in_place = model.run_with_hooks(batch, fwd_hooks=[(name, scale_in_place), (name, keep)])
    assert (returned - plain).abs().max() > 1e-4
    torch.testing.assert_close(returned, in_place, atol=1e-6, rtol=0)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(model(batch), plain)


@torch.no_grad()
def test_the_residual_stream_adds_up_with_deepstack_counted(model, batch):
    _, cache = model.run_with_cache(batch)
    layers = model.cfg.n_layers
    assert torch.equal(cache["hook_embed"], cache["resid_pre", 0])
    for layer in range(layers):
        mid, post = cache["resid_mid", layer], cache["resid_post", layer]
        torch.testing.assert_close(
            cache["resid_pre", layer] + cache["attn_out", layer], mid, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(mid + cache["mlp_out", layer], post, atol=1e-6, rtol=0)
        if layer + 1 < layers:
            added = cache.cache_dict.get(f"blocks.{layer}.hook_deepstack", torch.zeros_like(post))
            torch.testing.assert_close(
                post + added, cache["resid_pre", layer + 1], atol=1e-6, rtol=0
            )
    assert cache["blocks.0.hook_deepstack"].abs().sum() > 0
    norm = model.layout.decoder(model.hf).norm
    torch.testing.assert_close(
        norm.weight * cache["ln_final.hook_normalized"],
        norm(cache["resid_post", layers - 1]),
        atol=1e-5,
        rtol=0,
    )


def greedy(model, inputs, n=6, **options):
    return model.generate(inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_hugging_faces_tokens(model, batch, cache):
    length = batch.tensors["input_ids"].shape[1]
    wanted = model.hf.generate(
        **batch.tensors,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        cache_implementation=cache,
    )[:, length:]
    assert torch.equal(greedy(model, batch, cache_implementation=cache), wanted)
    steps = []

    def identity(x, hook):
        steps.append((list(x.shape), hook.ctx["positions"].tolist()))
        return x.clone()

    heads = model.cfg.n_heads
    for name in ("hook_z", "hook_rot_k", "hook_v", "hook_rot_q", "hook_pattern"):
        steps.clear()
        with model.hooks(fwd_hooks=[(f"blocks.1.attn.{name}", identity)]):
            assert torch.equal(greedy(model, batch, cache_implementation=cache), wanted), name
        assert [positions for _, positions in steps[1:]] == [[length + i] for i in range(5)]
    assert [shape for shape, _ in steps] == [[2, heads, length, length]] + [
        [2, heads, 1, length + i + 1] for i in range(5)
    ]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_kv_edits_enter_the_cache_and_knockouts_mask_at_decode_steps(model, batch, cache):
    """Cached generation under edits = running the whole sequence again under the same edits at each
    step."""

    def shrink(x, hook):
        return x * 0.3

    def cut(edges, hook):
        edges.cut([0, 1], "question+last+answer", "visual")

    hooks = [
        ("blocks.0.attn.hook_rot_k", shrink),
        ("blocks.1.attn.kv_head.1.hook_v", shrink),
        ("blocks.0.attn.hook_k", shrink),
        ("blocks.2.attn.hook_edges", cut),
    ]
    with model.hooks(fwd_hooks=hooks):
        actual = greedy(model, batch, cache_implementation=cache)
        sequence = dict(batch.tensors)
        again = []
        for _ in range(6):
            with torch.no_grad():
                inputs = type(batch)(dict(sequence), batch.token_maps, batch.samples)
                token = model(inputs)[:, -1].argmax(-1)
            again.append(token)
            for key, extra in (
                ("input_ids", token[:, None]),
                ("attention_mask", 1),
                ("mm_token_type_ids", 0),
            ):
                extra = extra if torch.is_tensor(extra) else torch.full_like(token[:, None], extra)
                sequence[key] = torch.cat([sequence[key], extra], dim=1)
    assert torch.equal(actual, torch.stack(again, dim=1))
    assert not torch.equal(actual, greedy(model, batch, cache_implementation=cache))


def test_generated_rows_are_read_as_answer_rows(model, batch):
    rows = []

    def keep(x, hook):
        rows.append((x.shape, hook.ctx["rows"].tolist()))

    length = batch.tensors["input_ids"].shape[1]
    with (
        model.pattern_rows("last+answer"),
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern_rows", keep)]),
    ):
        greedy(model, batch, n=3)
    assert [which for _, which in rows] == [[[length - 1]] * 2, [[length]] * 2, [[length + 1]] * 2]
    assert rows[-1][0] == (2, model.cfg.n_heads, 1, length + 2)
    rows.clear()
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern_rows", keep)]):
        greedy(model, batch, n=3)
    assert len(rows) == 1  # the question was read at the prefill; later steps have no question rows


def test_a_single_hook_needs_no_list(model, batch):
    hook = ("blocks.1.attn.hook_z", zero)
    edited = model.run_with_hooks(batch, fwd_hooks=[hook])
    assert torch.equal(model.run_with_hooks(batch, fwd_hooks=hook), edited)
    assert not torch.equal(edited, reference(model, batch))
    with model.hooks(hook), torch.no_grad():
        assert torch.equal(model(batch), edited)


def test_every_hook_is_gone_after_an_exception(model, batch):
    def explode(x, hook):
        raise RuntimeError("on purpose")

    plain = reference(model, batch)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    names = (
        "blocks.2.attn.hook_pattern",
        "blocks.2.attn.head.1.hook_z",
        "blocks.2.hook_resid_mid",
        "hook_logits",
    )
    for name in (*names, "blocks.0.hook_deepstack"):
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(
                batch,
                fwd_hooks=[(name, explode), ("blocks.0.hook_deepstack", lambda x, hook: x * 2)],
            )
        assert not any(point.active for point in model.hook_points())
        assert [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()
        ] == before
        assert "_deepstack_process" not in vars(model.layout.decoder(model.hf))
        assert {
            m.config._attn_implementation for m in model.hf.modules() if hasattr(m, "config")
        } == {"sdpa"}
        assert torch.equal(reference(model, batch), plain)


def test_batched_equals_single(model):
    samples = [sample(0), sample(1, (128, 96), "Which colour?", images=2), sample(2, (64, 64))]
    names = ["blocks.1.attn.hook_pattern_rows", "blocks.2.attn.hook_z", "blocks.3.hook_resid_post"]
    for side in ("left", "right"):
        together = model.prepare(samples, padding_side=side)
        with torch.no_grad():
            logits, cache = model.run_with_cache(together, names_filter=names)
        for i, sample_ in enumerate(samples):
            alone = model.prepare(sample_)
            with torch.no_grad():
                wanted, wanted_cache = model.run_with_cache(alone, names_filter=names)
            real = together.token_maps[i].real
            torch.testing.assert_close(logits[i, real], wanted[0], atol=1e-5, rtol=0)
            for name in names[1:]:
                torch.testing.assert_close(
                    cache[name][i, real], wanted_cache[name][0], atol=1e-5, rtol=0
                )
            rows = wanted_cache[names[0]].shape[2]
            torch.testing.assert_close(
                cache[names[0]][i, :, :rows][..., real],
                wanted_cache[names[0]][0],
                atol=1e-5,
                rtol=0,
            )


def test_gradients_are_those_of_the_plain_model(model, batch):
    tokens = batch.token_maps[0].last
    hf = model.hf
    hf.zero_grad()
    hf(**batch.tensors, use_cache=False).logits[0, tokens].sum().backward()
    wanted = {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}
    for name in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z",
                 "blocks.1.attn.hook_rot_k",
                 "blocks.1.attn.head.1.hook_z", "blocks.1.attn.hook_pattern_rows", "blocks.0.hook_deepstack",
                 "blocks.1.attn.hook_result", "blocks.1.ln1.hook_scale", "blocks.1.attn.hook_q"):  # fmt: skip
        hf.zero_grad()
        grads = []

        def forward(x, hook):
            return x * 1.0

        def backward(grad, hook, grads=grads):
            grads.append(grad[0] if isinstance(grad, tuple) else grad)

        with model.hooks(fwd_hooks=[(name, forward)], bwd_hooks=[(name, backward)]):
            model(batch)[0, tokens].sum().backward()
        assert grads and grads[0].abs().sum() > 0, name
        for parameter_name, parameter in hf.named_parameters():
            if parameter_name in wanted:
                torch.testing.assert_close(
                    parameter.grad, wanted[parameter_name], atol=2e-4, rtol=1e-3
                )
    hf.zero_grad()


def test_per_head_names_read_and_write_their_slice(model, batch):
    with torch.no_grad():
        _, cache = model.run_with_cache(
            batch,
            names_filter=["blocks.1.attn.head.3.hook_z", "blocks.1.attn.hook_z", "blocks.1.attn.head.3.hook_k",
                          "blocks.1.attn.kv_head.1.hook_k", "blocks.1.attn.head.3.hook_pattern"],
        )  # fmt: skip
    assert torch.equal(cache["blocks.1.attn.head.3.hook_z"], cache["z", 1][:, :, 3])
    assert torch.equal(
        cache["blocks.1.attn.head.3.hook_k"], cache["blocks.1.attn.kv_head.1.hook_k"]
    )
    assert cache["blocks.1.attn.head.3.hook_pattern"].ndim == 3
    with pytest.raises(CorelensError, match=r"kv_head\.1\.hook_k"):
        model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.head.3.hook_k", zero)])
    assert not any("head." in name for name in model.hook_names())
    with pytest.raises(CorelensError, match="0 to 3"):
        model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.head.4.hook_z", zero)])


def test_mistakes_are_named(model, batch, tmp_path):
    with pytest.raises(CorelensError, match=r"blocks\.1\.attn\.hook_z"):
        model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_zz", zero)])
    with pytest.raises(CorelensError, match=r"hook_resid_pre"):
        model.run_with_cache(batch, names_filter=["blocks.0.hook_resid_per"])

    for hooks in (
        [zero],
        ["blocks.1.attn.hook_z"],
        [("blocks.1.attn.hook_z", 0)],
        ("blocks.1.attn.hook_z", 0),
    ):
        with pytest.raises(CorelensError, match=r"list of such pairs"):
            model.run_with_hooks(batch, fwd_hooks=hooks)

    def truncate(x, hook):
        return x[:, :1]

    for name in (
        "blocks.1.attn.hook_z",
        "blocks.1.hook_resid_pre",
        "blocks.0.attn.head.1.hook_pattern_rows",
    ):
        with pytest.raises(CorelensError, match="truncate"):
            model.run_with_hooks(batch, fwd_hooks=[(name, truncate)])
    with pytest.raises(CorelensError, match="double"):

        def double(x, hook):
            return x.double()

        model.run_with_hooks(batch, fwd_hooks=[("blocks.1.attn.hook_z", double)])
    text_only = {key: batch.tensors[key] for key in ("input_ids", "attention_mask")}
    for call in (model, model.generate):
        with pytest.raises(CorelensError, match="image"):
            call(text_only)
    with pytest.raises(CorelensError, match="beams"):
        model.generate(batch, num_beams=2)
    with pytest.raises(CorelensError, match=r"config\.json"):
        HookedMLLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorelensError, match="could not load"):
        HookedMLLM.from_pretrained(tmp_path)


def test_a_saved_folder_loads_and_gives_the_same_logits(model, batch, tmp_path):
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = HookedMLLM.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        assert torch.equal(loaded(loaded.prepare([sample(0)])), model(model.prepare([sample(0)])))
    assert "4 layers" in repr(loaded)


def test_the_wrapped_model_is_not_ours_to_register(model):
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert next(iter(model.parameters())) is next(model.hf.parameters())
    assert model.cfg.n_key_value_heads == model.cfg.n_kv_heads
