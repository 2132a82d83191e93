"""The same tiny weights in TransformerLens's own TransformerBridge: same names, same numbers, where
it can wrap them.

It knows no Qwen2-VL, InternVL, SmolVLM and PaliGemma; on Qwen-VL it has no rotated q and k. Its
`hook_embed` sits before the picture is merged in, everywhere, and its hidden scores are the dtype's
lowest number where ours are −inf.
"""

import copy

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from helpers.families import tiny
from helpers.family_runs import alone, hooked

POINTS = [
    f"attn.hook_{n}" for n in ("q", "k", "v", "rot_q", "rot_k", "z", "pattern", "attn_scores")
]
POINTS += [f"hook_{n}" for n in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")]
POINTS += [
    "mlp.hook_pre",
    "mlp.hook_post",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
]


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    ["llava", "llava_next", "llava_onevision", "gemma3", "idefics3", "qwen2_5_vl", "qwen3_vl"],
)
def test_the_bridge_sees_the_same(family, tmp_path):
    hf, processor = tiny(family)
    processor.tokenizer.save_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)  # its config must name the architecture
    theirs = copy.deepcopy(hf)
    theirs.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=theirs, tokenizer=tokenizer, device="cpu"
    )
    model, batch = hooked(family), alone(family, 0)
    names = [f"blocks.{layer}.{point}" for layer in range(4) for point in POINTS]
    if family.startswith("qwen"):
        names = [name for name in names if "rot_" not in name and "scores" not in name]
    tensors = dict(batch.tensors)
    logits, cached = bridge.run_with_cache(tensors.pop("input_ids"), **tensors)
    theirs, ours = model.run_with_cache(batch, names_filter=names)
    torch.testing.assert_close(theirs, logits, atol=2e-5, rtol=2e-5)
    for name in names:
        wanted, x = cached[name].float(), ours[name].float()
        assert x.shape == wanted.shape, name
        seen = x > -torch.inf
        torch.testing.assert_close(x[seen], wanted[seen], atol=2e-5, rtol=2e-5)
        assert (wanted[~seen] < -1e30).all()
