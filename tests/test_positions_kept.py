"""What a cache keeps of which position: slices of the rows point, entries that grow over a
generation."""

import pytest
import torch

from corelens.errors import CorelensError
from helpers.families import FAMILIES
from helpers.family_runs import alone, batch_of, hooked, real

over_families = pytest.mark.parametrize("family", FAMILIES)
PATTERN, ROWS = "blocks.2.attn.hook_pattern", "blocks.2.attn.hook_pattern_rows"


@torch.no_grad()
@over_families
@pytest.mark.parametrize("pos_slice", [-1, 7, [3, 20, -2], (5, 30), (None, None, 9)])
def test_pos_slice_cuts_the_rows_point_by_position(family, pos_slice):
    """Its rows are the pattern's at these positions; zeros where a sample is padded."""
    model, batch = hooked(family), batch_of(family)
    _, cut = model.run_with_cache(batch, names_filter=[PATTERN, ROWS], pos_slice=pos_slice)
    positions = torch.arange(batch.length)
    positions = (
        positions[slice(*pos_slice)]
        if isinstance(pos_slice, tuple)
        else positions[pos_slice].reshape(-1)
    )
    real_rows = real(batch)[:, positions]
    assert cut[ROWS].shape == cut[PATTERN].shape
    wanted = cut[PATTERN] * real_rows[:, None, :, None]
    torch.testing.assert_close(cut[ROWS], wanted, atol=1e-6, rtol=1e-5)
    head = "blocks.2.attn.head.1.hook_pattern_rows"
    _, sliced = model.run_with_cache(batch, names_filter=head, pos_slice=pos_slice)
    torch.testing.assert_close(sliced[head], wanted[:, 1], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_pos_slice_of_rows_that_are_said_explicitly():
    model, batch = hooked("qwen3_vl"), alone("qwen3_vl", 0)
    _, whole = model.run_with_cache(batch, names_filter=PATTERN)
    with model.pattern_rows([4, 9, 11]):
        _, cut = model.run_with_cache(
            batch, names_filter=ROWS, pos_slice=[11, 4], remove_batch_dim=True
        )
        with pytest.raises(CorelensError, match=r"rows \[5\]"):
            model.run_with_cache(batch, names_filter=ROWS, pos_slice=5)
    torch.testing.assert_close(cut[ROWS], whole[PATTERN][0, :, [11, 4]], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@over_families
def test_over_a_generation_every_entry_has_every_position(family):
    """The prompt's, and one a step but the last: logits and what DeepStack adds, too."""
    model, batch = hooked(family), alone(family, 0)
    names = [
        name
        for name in model.hook_names()
        if not name.startswith("vision.") and "edges" not in name
    ]
    cache, hooks, _ = model.get_caching_hooks(names)
    with model.hooks(hooks):
        ids = model.generate(batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    length = batch.length + 2
    for name in names:
        if name.endswith("pattern_rows"):
            continue  # rows, not positions
        assert cache[name].shape[2 if name.endswith(("pattern", "scores")) else 1] == length, name
    assert torch.equal(cache["hook_logits"][0, -3:].argmax(-1), ids[0])
    tensors = {**batch.tensors}
    plain = model(batch)
    torch.testing.assert_close(cache["hook_logits"][:, : batch.length], plain, atol=2e-5, rtol=2e-4)
    assert tensors.keys() == batch.tensors.keys()
    for name in names:
        if name.endswith("hook_deepstack"):
            assert (cache[name][:, -2:] == 0).all() and (cache[name] != 0).any()
    if any("deepstack" in name for name in names):
        pre, post = cache["blocks.1.hook_resid_pre"], cache["blocks.0.hook_resid_post"]
        torch.testing.assert_close(pre, post + cache["blocks.0.hook_deepstack"])


@torch.no_grad()
def test_deepstack_without_a_picture_is_nothing_and_can_be_written():
    """A prompt of text alone adds zeros there, and an edit of them is an edit of the run."""
    model = hooked("qwen3_vl")
    text = model.inputs(
        input_ids=torch.tensor([[20, 21, 22, 23]]), attention_mask=torch.ones(1, 4).long()
    )
    logits, cached = model.run_with_cache(text)
    assert (cached["blocks.0.hook_deepstack"] == 0).all() and torch.equal(logits, model(text))
    assert len(cached.decompose_resid(return_labels=True)[1]) == 1 + 2 * 4 + model.cfg.n_deepstack
    added = model.run_with_hooks(
        text, fwd_hooks=[("blocks.0.hook_deepstack", lambda x, hook: x + 1)]
    )
    shifted = model.run_with_hooks(
        text, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x + 1)]
    )
    assert torch.equal(added, shifted) and not torch.allclose(added, logits)


@torch.no_grad()
@over_families
def test_generation_without_a_cache_of_logits_keeps_the_last_row(family):
    model, batch = hooked(family), alone(family, 0)
    rows = []
    with model.hooks([("hook_logits", lambda x, hook: rows.append(x.shape[1]))]):
        model.generate(batch, max_new_tokens=2, min_new_tokens=2)
    assert rows == [1, 1]
