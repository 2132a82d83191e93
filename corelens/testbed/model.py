"""Multimodal models whose weights are set by hand, so that what each head does is known exactly.

The residual stream is a list of named flags, each a dimension of its own. A visual token carries
its digit, its frame and its cell; a text token carries "text". The picture gets there through a
real vision tower (each patch's pixels are mapped to the flags of what is drawn in it) and a real
projector. All heads have the same keys (frame, cell, first token) and the same values (digit, cell,
"visual"); they differ in what their queries ask for and in where their output goes. Rotary
frequencies are so low in the dimensions used that position plays no role. MLPs add nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from corelens.errors import CorelensError
from corelens.model.hooked import HookedMLLM
from corelens.testbed.pictures import CELL, CELLS, FRAMES, SIDE, cell

FLAGS = [
    *(f"digit:{i}" for i in range(10)),
    *(f"frame:{name}" for name in FRAMES),
    *(f"cell:{i}" for i in range(CELLS)),
    "visual",
    "text",
    "first",
    "is digit",
    "rest",
    # what the where head writes: the marked cell, and that it is known
    *(f"found:{i}" for i in range(CELLS)),
    "have",
    # what decoys write; nobody reads junk
    *(f"other:{i}" for i in range(CELLS)),
    *(f"junk:{i}" for i in range(10)),
    *(f"out:{i}" for i in range(10)),  # what the copy head writes, and the unembedding reads
    # the question mark; what readers write at their rows
    "asks",
    *(f"carried:{i}" for i in range(10)),
]
SEEN = FLAGS[: 10 + len(FRAMES) + CELLS]  # those that the vision tower finds in the pixels
WIDTH, HEAD, VISION = 128, 64, 32
# scores before the softmax: what is sought, where to look without it, a veto
SURE, MAYBE, NEVER = 60.0, 30.0, -120.0
UNIT = (WIDTH / 4) ** 0.5  # a flag after the norm, in a token of squared length 4
# these pairs turn by less than 1e-6 a position
UNROTATED = [*range(8, HEAD // 2), *range(HEAD // 2 + 8, HEAD)]


@dataclass(frozen=True)
class Kind:
    """What a head asks for, and where its output goes.

    Args:
        asks: (flag of the query's token, flag of the key's token, score) triples.
        writes: (flag of the key's token, flag it becomes) pairs.
        strength: how much of the flag is written.
    """

    asks: tuple[tuple[str, str, float], ...] = ()
    writes: tuple[tuple[str, str], ...] = ()
    strength: float = 1.0


def _each(a: str, b: str, n: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"{a}:{i}", f"{b}:{i}") for i in range(n))


# visual rows do nothing; text rows only if they must
_RESTS = (("visual", "first", SURE), ("text", "first", MAYBE))
_FINDS = (("text", "frame:marked", SURE), *_RESTS)
_TELLS = (*_each("cell", "found", CELLS), ("visual", "have"))
KINDS: dict[str, Kind] = {
    "target": Kind(_FINDS),
    "distractor": Kind(
        (("text", "frame:distractor", SURE), *_RESTS), _each("cell", "other", CELLS)
    ),
    "bystander": Kind((("text", "frame:distractor", SURE), *_RESTS)),
    "uniform": Kind(),
    "sink": Kind((("visual", "first", SURE), ("text", "first", SURE))),
    "where": Kind(_FINDS, _TELLS),
    "backup": Kind((*_FINDS, ("have", "frame:marked", NEVER)), _TELLS),
    "copy": Kind(
        (*((a, b, SURE) for a, b in _each("found", "cell", CELLS)), *_RESTS),
        _each("digit", "out", 10),
    ),
    "decoy": Kind(
        (*((a, b, SURE) for a, b in _each("other", "cell", CELLS)), *_RESTS),
        _each("digit", "junk", 10),
    ),
    "reader": Kind(_FINDS, _each("digit", "carried", 10), strength=1 / 4),
    "murmur": Kind(_FINDS, _each("digit", "carried", 10), strength=1 / 32),
    "collector": Kind((("text", "asks", SURE),), _each("carried", "out", 10), strength=1 / 2),
}
"""The heads that a plan can name.

target       looks at the red cell whatever happens, and writes nothing
distractor   looks at the blue cell, and writes which it is where only a decoy reads
bystander    looks at the blue cell, and writes nothing
uniform      looks equally at everything
sink         looks at the first token
where        looks at the red cell, and writes which cell it is
backup       as where, but only if no earlier head has done it; else it looks at the first token
copy         looks at the cell that where (or backup) wrote; moves its digit to the output
decoy        looks at the cell that the distractor wrote; moves its digit where nobody reads it
reader       looks at the red cell from every text token, and writes its digit there
murmur       as reader, but so faintly that it takes many of them
collector    looks at the question mark; moves the digit that readers wrote there to the output
"""

LOOKING = (("target", "distractor", "uniform", "sink"),)
CIRCUIT = (
    ("where", "distractor", "uniform", "sink"),
    ("uniform", "backup", "distractor", "sink"),
    ("sink", "decoy", "copy", "uniform"),
)
_IDLE = ("uniform", "sink", "bystander", "sink") * 4
CORE = (("reader",) * 2 + _IDLE[2:], ("collector",) * 2 + _IDLE[2:])
SPREAD = (("murmur",) * 16, ("collector",) * 2 + ("murmur",) * 14)
BLIND = (_IDLE, ("collector",) * 2 + _IDLE[2:])


def core_model() -> HookedMLLM:
    """Retrieval as the CoRe paper describes it: two of 32 heads fetch the digit at the question's
    tokens.

    L0H0 and L0H1 (readers) write the red cell's digit into the question's tokens; L1H0 and L1H1
    (collectors) carry it from the question mark to the last row. All other heads look at
    everything, at the blue cell or nowhere.
    """
    return build(CORE)


def spread_model() -> HookedMLLM:
    """The same answers without specialised heads: 30 of 32 heads fetch the digit, each a little of
    it."""
    return build(SPREAD)


def blind_model() -> HookedMLLM:
    """The same model without readers: nobody looks for the red cell, and nothing is answered."""
    return build(BLIND)


def looking_model() -> HookedMLLM:
    """One layer: L0H0 looks at the red cell, L0H1 at the blue one, L0H2 equally at everything, L0H3
    at the first token.

    It answers nothing: its logits do not depend on the picture.
    """
    return build(LOOKING)


def circuit_model() -> HookedMLLM:
    """A circuit that answers which digit is marked, exactly.

    L0H0 (where) finds the red cell and writes which it is into the row; L2H2 (copy) looks there and
    moves its digit to the output. L1H1 (backup) does what L0H0 does, but only if L0H0 has not.
    L0H1, L1H2 and L2H1 are decoys: they look at the blue cell, and what they write is not read. The
    others are uniform heads and sinks.
    """
    return build(CIRCUIT)


def build(plan: Sequence[Sequence[str]]) -> HookedMLLM:
    """A model with the heads of a plan: one list a layer of names in KINDS, an even number of heads
    in each."""
    counts = {len(layer) for layer in plan}
    unknown = sorted({name for layer in plan for name in layer} - set(KINDS))
    if len(counts) != 1 or unknown or next(iter(counts)) % 2:
        raise CorelensError(
            f"a plan with layers of {sorted(counts)} heads"
            + (f" and the unknown heads {unknown}" if unknown else ""),
            f"the same even number of heads in each layer, all among {', '.join(KINDS)}",
            "for instance testbed.build([('target', 'sink')])",
        )
    processor = _processor()
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 8,
            "num_hidden_layers": len(plan),
            "num_attention_heads": counts.pop(),
            "num_key_value_heads": len(plan[0]) // 2,
            "head_dim": HEAD,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e24},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": VISION,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE * CELL,
            "patch_size": CELL,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=CELLS,
    )
    hf = LlavaForConditionalGeneration(config).eval()
    generation = hf.generation_config
    generation.bos_token_id, generation.eos_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    generation.pad_token_id, generation.do_sample = tokenizer.pad_token_id, False
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.fill_(
                1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            )
        _set_vision(hf)
        _set_embeddings(hf, tokenizer)
        for layer, kinds in zip(hf.model.language_model.layers, plan, strict=True):
            _set_attention(layer.self_attn, [KINDS[name] for name in kinds])
    return HookedMLLM(hf, processor)


# --- what the weights are


def _at(flag: str) -> int:
    return FLAGS.index(flag)


def _set_vision(hf: Any) -> None:
    """Patch pixels → flags of what is drawn there; position embedding → cell; projector → the
    residual stream."""
    tower = hf.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    looks = [(digit, frame) for digit in range(10) for frame in FRAMES]
    pixels = np.stack(
        [cell(*look).astype(np.float64).transpose(2, 0, 1).ravel() / 127.5 - 1 for look in looks]
    )
    wanted = np.zeros((len(looks), VISION))
    for line, (digit, frame) in zip(wanted, looks, strict=True):
        line[_at(f"digit:{digit}")] = line[_at(f"frame:{frame}")] = 1
    # digits and frames share no pixel, so flags are a linear function of pixels, and least squares
    # finds it
    weight = np.linalg.pinv(pixels) @ wanted
    tower.embeddings.patch_embedding.weight.copy_(
        torch.tensor(weight.T).reshape(VISION, 3, CELL, CELL)
    )
    for number in range(CELLS):
        tower.embeddings.position_embedding.weight[1 + number, _at(f"cell:{number}")] = 1
    # Three flags of VISION are always set, so the tower's norm maps 0 and 1 to two fixed numbers;
    mean, eps = 3 / VISION, hf.config.vision_config.layer_norm_eps
    low, high = ((x - mean) / (mean * (1 - mean) + eps) ** 0.5 for x in (0.0, 1.0))
    projector, steep = hf.model.multi_modal_projector, 20.0
    middle = (low + high) / 2
    for number in range(len(SEEN)):  # and the projector's GELU makes them 0 and 1 again.
        projector.linear_1.weight[number, number] = steep
        projector.linear_2.weight[number, number] = 1 / (steep * (high - middle))
    projector.linear_1.bias.fill_(-steep * middle)
    projector.linear_1.bias[len(SEEN) :] = -steep
    projector.linear_2.bias[_at("visual")] = 1


def _set_embeddings(hf: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every token has squared length 4, so that the norm is the same for all before any head has
    written."""
    embed, unembed = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    embed[:, _at("text")] = 1
    embed[:, _at("rest")] = 3**0.5
    first = tokenizer.bos_token_id
    embed[first, _at("text")], embed[first, _at("first")] = 0, 1
    for digit in range(10):
        token = tokenizer.convert_tokens_to_ids(str(digit))
        embed[token, _at("is digit")], embed[token, _at("rest")] = 1, 2**0.5
        unembed[token, _at(f"out:{digit}")] = 2
    asks = tokenizer.convert_tokens_to_ids("?")
    embed[asks, _at("asks")], embed[asks, _at("rest")] = 1, 2**0.5
    unembed[tokenizer.eos_token_id, _at("is digit")] = 6  # after a digit the answer ends


def _set_attention(attn: Any, kinds: Sequence[Kind]) -> None:
    keys = [
        *(f"frame:{name}" for name in FRAMES),
        *(f"cell:{i}" for i in range(CELLS)),
        "first",
        "asks",
    ]
    values = [*(f"digit:{i}" for i in range(10)), *(f"cell:{i}" for i in range(CELLS)), "visual"]
    values += [f"carried:{i}" for i in range(10)]
    dimensions = dict(zip(keys, UNROTATED, strict=False))
    q, k, v, o = (_split(attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    for group in range(len(k)):
        for flag, dimension in dimensions.items():
            k[group, dimension, _at(flag)] = 1
        for dimension, flag in enumerate(values):
            v[group, dimension, _at(flag)] = 1 / UNIT
    for head, kind in enumerate(kinds):
        for row_flag, key_flag, score in kind.asks:
            q[head, dimensions[key_flag], _at(row_flag)] = score * HEAD**0.5 / UNIT**2
        for source, target in kind.writes:
            o[head, values.index(source), _at(target)] = kind.strength
    attn.q_proj.weight.copy_(q.flatten(0, 1))
    attn.k_proj.weight.copy_(k.flatten(0, 1))
    attn.v_proj.weight.copy_(v.flatten(0, 1))
    attn.o_proj.weight.copy_(o.flatten(0, 1).T)


def _split(attn: Any, name: str) -> Tensor:
    """Zeros [head, d_head, d_model] for a projection of this layer."""
    weight = getattr(attn, name).weight
    heads = (weight.shape[1] if name == "o_proj" else weight.shape[0]) // HEAD
    return torch.zeros(heads, HEAD, WIDTH)


# --- the processor

TEMPLATE = (
    "{{- '<s>' -}}{%- for message in messages -%}{{- message.role + ': ' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- '<image>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- "
    "'\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)


def _processor() -> Any:
    """A tokenizer of single bytes, and pictures that go in as they are."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate([*special, *letters])}, merges=[]
        )
    )
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    side = SIDE * CELL
    half: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **half
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=CELL,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    )
