"""A tiny model of any multimodal type of transformers, all its parameters random.

Its class's default config is taken, and every width, depth, count and id in it is made small by the
rules below; `exceptions.py` holds what these rules cannot know of a type.
"""

import copy
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from families.exceptions import EXCEPTIONS

TYPES: dict[str, str] = {
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
WIDTH, INNER, VOCABULARY, DEPTH, TOWER_DEPTH = 64, 96, 512, 4, 2
IMAGE_TOKEN = 400  # of a type whose default config has none

# name of a config's entry → its value; the first pattern that fits the whole name decides
EXACTLY: tuple[tuple[str, int], ...] = (
    ("hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_dim|word_embed_proj_dim", WIDTH),
    ("(out|output|text|vision|encoder|llm|lm|image_text|compressor|multimodal)_hidden_size", WIDTH),
    ("(output|out|projection|vision_output|projector_input|projector_output)_dim", WIDTH),
    ("(decoder|encoder|expert|dense|alignment|projection|projector|shared)_intermediate_size", INNER),
    ("(moe|moe_shared_expert|shared_expert|shared_experts)_intermediate_size", INNER),
    ("intermediate_(size|dim)|intermediate_size_mlp|ffn_dim|(en|de)coder_ffn_dim|mlp_dim|d_ff", INNER),
    ("projector_hidden_size|projection_hidden_(dim|size)|share_expert_dim", INNER),
    ("((num_)?attention|num|n|(en|de)coder_attention|swa_num_attention)_heads?|n_head", 4),
    ("(head_dim|attention_head_dim|v_head_dim|qk_head_dim|swa_head_dim|d_kv|index_head_dim)", 16),
    ("(q|kv)_lora_rank|global_head_dim|num_mel_bins|max_source_positions", 16),
    ("qk_(nope|rope)_head_dim|linear_(key|value)_head_dim|laurel_rank|hidden_size_per_layer_input", 8),
    ("mamba_(num_heads|n_heads)|linear_num_value_heads|n_window", 4),
    ("linear_num_key_heads|index_n_heads|num_global_key_value_heads", 2),
    ("mamba_(head_dim|d_head)", 16),
    ("ssm_state_size|mamba_d_state|chunk_size|sliding_window(_size)?|attention_chunk_size", 8),
    ("n_groups|mamba_n_groups|n_group|topk_group|n_shared_experts|moe_num_shared_experts", 1),
    ("first_k_dense_replace", 1),
    ("num_nextn_predict_layers|num_mtp_modules|mtp_num_hidden_layers", 0),
    ("vocab_size_per_layer_input", VOCABULARY),
    ("(num_)?(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    ("num_position_embeddings|codebook_size|downsample_hidden_size", 64),
    ("index_topk", 16),
)  # fmt: skip
AT_MOST = (("num_experts_per_tok|moe_k|top_k_experts|moe_topk|experts_per_token", 2),)
DEPTHS = re.compile(
    "num_hidden_layers|num_layers|n_layers?|n_hidden_layers|depth|num_(en|de)coder_layers"
    "|(en|de)coder_layers|resampler_depth|perceiver_depth"
)
KEY_HEADS = re.compile("num_key_value_heads|n_kv_heads|swa_num_key_value_heads")
TOKEN = re.compile(r"\w*(token|patch|pad|bos|eos|boi|eoi|im|img)_(ids?|index|idx)|image_token")
KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
# lists of layers by number, of towers that have two
LAYER_LISTS: dict[str, list[int]] = {
    "global_attn_indexes": [1],
    "fullatt_block_indexes": [1],
    "vision_feature_layer": [-1, -2],
    "vision_feature_layers": [-1, -2],
    "deepstack_visual_indexes": [0, 1],
}
ROPES = ("rope_parameters", "rope_scaling")


def build(model_type: str) -> nn.Module:
    """The tiny model in evaluation mode, in float32."""
    torch.manual_seed(0)
    cls = getattr(transformers, TYPES[model_type])
    config = tiny_config(model_type)
    make = getattr(cls, "_from_config", cls)
    hf = randomised(cls(config) if EXCEPTIONS.get(model_type, {}).get("plain") else make(config))
    if hasattr(hf, "language_model") and model_type == "llama4":
        hf.language_model.register_forward_hook(_without_image_outputs)
    return hf


def _without_image_outputs(module: nn.Module, args: Any, output: Any) -> None:
    """transformers 5.24's Llama 4 reads this of its decoder's output, which has no such field: a
    plain run raises."""
    if not hasattr(output, "image_outputs"):
        object.__setattr__(output, "image_outputs", None)


def tiny_config(model_type: str) -> Any:
    """The tiny config of a type."""
    config_class = getattr(transformers, TYPES[model_type]).config_class
    exception = EXCEPTIONS.get(model_type, {})
    entries = copy.deepcopy(config_class(**exception.get("first", {})).to_dict())
    _shrink(entries, {}, text=True)
    for name in ("image_token_id", "image_token_index"):
        if entries.get(name, 0) is None:
            entries[name] = IMAGE_TOKEN
    for name in ("_attn_implementation", "transformers_version", "dtype", "torch_dtype"):
        entries.pop(name, None)
    for path, values in exception.get("set", {}).items():
        held = entries
        for name in filter(None, path.split(".")):
            held = held[name]
        held.update(copy.deepcopy(values))
    for path in exception.get("without", ()):
        *above, last = path.split(".")
        held = entries
        for name in above:
            held = held[name]
        held.pop(last, None)
    return config_class(**entries)


def _shrink(entries: dict[str, Any], ids: dict[int, int], text: bool) -> None:
    """Make a config's dict small, in place; `ids` are the special tokens met so far, and their new
    ids."""
    text = text and ("vocab_size" in entries or not any(DEPTHS.fullmatch(str(k)) for k in entries))
    deep = next((v for k, v in entries.items() if DEPTHS.fullmatch(str(k)) and _int(v)), None)
    depth = DEPTH if text else TOWER_DEPTH
    layers = _layers(entries, depth)
    for name, value in list(entries.items()):
        if name == "per_layer_config" and value:  # of the layers that stay, by their new numbers
            held = {int(i): _shrunk(own, ids) for i, own in value.items()}
            entries[name] = {new: held[old] for new, old in enumerate(layers) if old in held}
        elif isinstance(value, dict):
            if name not in (*ROPES, "id2label", "label2id"):
                _shrink(value, ids, not re.search("vision|audio|vq|speech|codec", str(name)))
        elif isinstance(value, (list, tuple)):
            if TOKEN.fullmatch(str(name)):
                entries[name] = [_token(i, ids) for i in value]
            elif deep and len(value) == deep:
                entries[name] = [value[i] for i in layers]
            elif name in LAYER_LISTS:
                entries[name] = LAYER_LISTS[str(name)]
            elif name == "image_size":
                entries[name] = [4 * _patch(entries)] * 2
        elif _int(value):
            entries[name] = _number(str(name), value, entries, ids, len(layers), text)
    for name in ROPES:
        if isinstance(entries.get(name), dict):
            _shrink_rope(entries[name], entries)


def _shrunk(entries: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    _shrink(entries, ids, text=True)
    return entries


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layers(entries: dict[str, Any], depth: int) -> list[int]:
    """Which of the default's layers stay: of every kind the first ones, in turn."""
    kinds = next((entries[n] for n in KINDS if isinstance(entries.get(n), (list, tuple))), None)
    if not kinds:
        return list(range(depth))
    of_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    turns = [list(of_kind)[i % len(of_kind)] for i in range(max(depth, len(of_kind)))]
    seen: dict[Any, int] = dict.fromkeys(of_kind, -1)
    layers = []
    for kind in turns:
        seen[kind] += 1
        layers.append(of_kind[kind][min(seen[kind], len(of_kind[kind]) - 1)])
    return layers


def _number(
    name: str, value: int, entries: dict[str, Any], ids: Any, depth: int, text: bool
) -> int:
    if DEPTHS.fullmatch(name):
        return depth
    if name == "vocab_size":
        return VOCABULARY
    if KEY_HEADS.fullmatch(name):
        return (2 if text else 4) if value > 0 else value
    if name == "image_size":
        return 4 * _patch(entries)
    if TOKEN.fullmatch(name):
        return _token(value, ids)
    for pattern, size in AT_MOST:
        if re.fullmatch(pattern, name):
            return min(value, size)
    for pattern, size in EXACTLY:
        if re.fullmatch(pattern, name):
            return size if value > 0 else value
    return value


def _patch(entries: dict[str, Any]) -> int:
    patch = entries.get("patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) and patch else patch
    return patch if isinstance(patch, int) else 14


def _token(value: Any, ids: dict[int, int]) -> Any:
    """Special tokens keep apart from each other: they get the vocabulary's last ids."""
    if not _int(value) or value < 5:
        return value
    return ids.setdefault(value, VOCABULARY - 1 - len(ids))


def _shrink_rope(rope: dict[str, Any], entries: dict[str, Any]) -> None:
    """The sections of multimodal rotary embeddings add up to half of a head's rotated width."""
    for part in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        d_head = entries.get("head_dim") or 16
        share = part.get("partial_rotary_factor") or entries.get("partial_rotary_factor") or 1.0
        half, sections = int(d_head * share) // 2, part.get("mrope_section")
        if isinstance(sections, list):
            small = [max(1, half * x // sum(sections)) for x in sections]
            small[0] += half - sum(small)
            part["mrope_section"] = small
        for name in ("long_factor", "short_factor"):
            if name in part:
                part[name] = [1.0] * half


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter seeded noise at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(0)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if (
                "A_log" in name or "dt_bias" in name
            ):  # of recurrent layers: beyond this they explode
                parameter.copy_(0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim <= 1:  # norms and gates: around their initial value
                parameter.nan_to_num_().add_(0.2 * noise)
            elif id(parameter) in tables or ("weight" not in name and parameter.shape[0] == 1):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.mul_(0.8)  # a checkpoint's are not 1
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.zero_()
    return model.eval()
