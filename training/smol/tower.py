"""The vision tower of smol-vlm and its first lesson: what object lies at each visual token, and
what stands on it.

The tower is Idefics3's class. It begins with qwen3vl-m's tower, whose blocks have the same shapes
(that one turns its queries and keys by row and column, this one adds positions: its attention has
to learn its way again).

Beside the probes' cross-entropy, the connector learns to give each token the mean of the embeddings
of the words that name what lies there ("red", "circle", "7"; "background" where nothing does), so
that the decoder, which has only ever read words, begins with tokens that it understands.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import (
    Idefics3Connector,
    Idefics3VisionTransformer,
)

from corelens.data.synthetic.drawing import LETTERS
from corelens.data.synthetic.refer import COLOURS, KINDS

SIDE, PATCH, MERGE = 256, 16, 2
"""Pixels a side of what the tower sees, of a patch, and patches a side of a visual token."""
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TAUGHT = ("colour", "kind", "digit", "letter", "size")
IGNORED = -100


@dataclass
class Words:
    """Embeddings of the words that name what labels mean: [values + 1, width] a label, the last
    (none) zero; and that of an empty token."""

    tables: dict[str, Tensor]
    empty: Tensor

    def target(self, labels: dict[str, Tensor]) -> Tensor:
        """[tokens, width]: the mean of what is named at each token."""
        named = {key: self.tables[key][labels[key]] for key in self.tables}
        count = torch.stack(
            [labels[key] < len(table) - 1 for key, table in self.tables.items()]
        ).sum(0)
        total = torch.stack(list(named.values())).sum(0)
        return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], self.empty)


def words(tokenizer: Any, embeddings: Tensor) -> Words:
    """From a decoder's tokenizer and its embeddings [vocabulary, width]."""

    def table(names: list[str]) -> Tensor:
        ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
        rows = [embeddings[i].float().mean(0) for i in ids]
        return torch.stack([*rows, torch.zeros_like(rows[0])])

    spaced = {"colour": list(COLOURS), "kind": list(KINDS)}
    tables = {key: table([f" {name}" for name in names]) for key, names in spaced.items()}
    tables["digit"] = table([str(i) for i in range(10)])
    tables["letter"] = table([f" {letter}" for letter in LETTERS])
    return Words(tables, table([" background"])[0])


def begin_tower(tower: Any, weights: dict[str, Tensor]) -> None:
    """Copy qwen3vl-m's tower (`weights` by name) into Idefics3's."""
    w = {key.removeprefix("model.visual."): value.float() for key, value in weights.items()}
    with torch.no_grad():
        patches = tower.embeddings.patch_embedding
        patches.weight.copy_(w["patch_embed.proj.weight"].sum(2))
        patches.bias.copy_(w["patch_embed.proj.bias"])
        tower.embeddings.position_embedding.weight.copy_(w["pos_embed.weight"])
        tower.post_layernorm.weight.copy_(w["merger.norm.weight"])
        tower.post_layernorm.bias.copy_(w["merger.norm.bias"])
        for i, layer in enumerate(tower.encoder.layers):
            layer_name = f"blocks.{i}."
            for kind in ("weight", "bias"):
                q, k, v = w[f"{layer_name}attn.qkv.{kind}"].chunk(3)
                attn = layer.self_attn
                for part, value in ((attn.q_proj, q), (attn.k_proj, k), (attn.v_proj, v)):
                    getattr(part, kind).copy_(value)
                getattr(attn.out_proj, kind).copy_(w[f"{layer_name}attn.proj.{kind}"])
                getattr(layer.layer_norm1, kind).copy_(w[f"{layer_name}norm1.{kind}"])
                getattr(layer.layer_norm2, kind).copy_(w[f"{layer_name}norm2.{kind}"])
                getattr(layer.mlp.fc1, kind).copy_(w[f"{layer_name}mlp.linear_fc1.{kind}"])
                getattr(layer.mlp.fc2, kind).copy_(w[f"{layer_name}mlp.linear_fc2.{kind}"])


def pixels_of(images: np.ndarray) -> Tensor:
    """uint8 [batch, SIDE, SIDE, 3] → [batch, 3, SIDE, SIDE] from −1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def features(tower: Any, pixels: Tensor) -> Tensor:
    """The tower's output [batch, patches, width]; its attention in float32, as it is faster
    there."""
    side = SIDE // PATCH
    patches = (
        pixels.unflatten(2, (side, PATCH))
        .unflatten(4, (side, PATCH))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
    )
    embed = tower.embeddings
    hidden = F.linear(
        patches.flatten(1, 2), embed.patch_embedding.weight.flatten(1), embed.patch_embedding.bias
    )
    # as many positions as patches, in the same order
    hidden = hidden + embed.position_embedding.weight
    for layer in tower.encoder.layers:
        attn, normed = layer.self_attn, layer.layer_norm1(hidden)
        q, k, v = (
            part(normed).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        with torch.autocast("cpu", enabled=False):
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        hidden = hidden + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return tower.post_layernorm(hidden)


def build_tower(text: Any) -> tuple[Idefics3VisionTransformer, Idefics3Connector]:
    """Tower and connector from random weights, for a decoder of config `text`."""
    # A copy: a config that becomes part of another forgets its attention implementation, and
    # causality with it.
    config = Idefics3Config(
        vision_config=VISION, text_config=copy.deepcopy(text), scale_factor=MERGE
    )
    vision: Any = config.vision_config
    return Idefics3VisionTransformer(vision), Idefics3Connector(config)


def build_probes(sizes: dict[str, int]) -> nn.ModuleDict:
    """One linear reader a label, of a token's patches together."""
    width = VISION["hidden_size"] * MERGE**2
    return nn.ModuleDict({key: nn.Linear(width, sizes[key] + 1) for key in TAUGHT})


def dense_loss(
    tower: Any,
    connector: Any,
    probes: Any,
    batch: dict[str, np.ndarray],
    named: Words,
    columns: dict[str, int],
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The probes' loss, the connector's (mean squared error over the target's mean square), and the
    share right."""
    hidden = features(tower, pixels_of(batch["images"]))
    shuffled = connector.pixel_shuffle(hidden, MERGE).flatten(0, 1)
    visual = connector.modality_projection(shuffled).float()
    labels = torch.from_numpy(batch["labels"]).flatten(0, 1)
    loss, marks = visual.new_zeros(()), {}
    for key, probe in probes.items():
        gold, none = labels[:, columns[key]], probe.out_features - 1
        if (gold == IGNORED).all():
            continue
        logits = probe(shuffled).float()
        weight = logits.new_ones(none + 1)
        weight[none] = 0.2
        loss = loss + F.cross_entropy(logits, gold, weight)
        labelled = (gold != none) & (gold != IGNORED)
        marks[key] = (logits.argmax(-1) == gold)[labelled].float().mean().item()
    if (labels[:, columns["colour"]] == IGNORED).all():
        return loss, visual.new_zeros(()), marks
    named_labels = {key: labels[:, columns[key]] for key in named.tables}
    named_labels = {
        key: row.masked_fill(row == IGNORED, len(named.tables[key]) - 1)
        for key, row in named_labels.items()
    }
    target = named.target(named_labels)
    return loss, F.mse_loss(visual, target) / target.square().mean(), marks
