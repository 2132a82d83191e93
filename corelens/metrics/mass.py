"""Attention mass: what the rows of a pattern put on a set of keys. The sums that RAM and its
relatives are made of."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.token_map import TokenMap

REDUCTIONS = ("mean", "max")  # over rows
KEY_REDUCTIONS = ("sum", "mean", "max", "hit")  # over the keys of a set

Weighted = tuple[Int[Tensor, " key"], Float[Tensor, " key"]]  # positions and their weights


class Column(NamedTuple):
    """One number that is taken of every row: the attention on a set of keys, reduced over these
    keys."""

    tokens: str  # one of SETS
    keys: str = "sum"  # one of KEY_REDUCTIONS


# --- the sets of keys


def _evidence(token_map: TokenMap) -> Weighted:
    return token_map.region, token_map.region_weight


def _modality(token_map: TokenMap) -> Tensor:
    """The visual tokens, or the audio tokens where the evidence is in a sound."""
    if not len(token_map.audio):
        return token_map.visual
    evidence = [tokens for tokens, _ in token_map.covered]
    are_audio = [bool(torch.isin(tokens, token_map.audio).all()) for tokens in evidence]
    in_sound = all(are_audio) if are_audio else not len(token_map.visual)
    return token_map.audio if in_sound else token_map.visual


def _visual(token_map: TokenMap) -> Weighted:
    tokens = _modality(token_map)
    return tokens, torch.ones(len(tokens))


def _evenly_spread(token_map: TokenMap) -> Weighted:
    tokens = _modality(token_map)
    evidence_fraction = float(token_map.region_weight.sum()) / max(len(tokens), 1)
    return tokens, torch.full((len(tokens),), evidence_fraction)


def _shifted(token_map: TokenMap) -> Weighted:
    """The region's weights, averaged over all its shifts within its picture that do not overlap it.

    Shifts are cyclic, in the order of the picture's tokens, and keep the region's shape. Where
    every shift overlaps the region, those that overlap it least are taken. Overlaps and average are
    circular correlation and convolution, which the Fourier transform computes for all shifts at
    once.
    """
    weights = torch.zeros(token_map.length, dtype=torch.double)
    weights[token_map.region] = token_map.region_weight.double()
    pictures = [token_map.visual] if token_map.pictures is None else token_map.images
    pictures += [sound.positions for sound in token_map.sounds or []]
    shifted = torch.zeros_like(weights)
    for positions in pictures:
        inside = weights[positions]
        if not inside.any():
            continue
        spectrum = torch.fft.fft(inside)
        indicator = torch.fft.fft((inside > 0).double())
        # [shift]: how many tokens of the region are in the shifted region too
        overlap = torch.fft.ifft(indicator * indicator.conj()).real.round()
        allowed = (overlap == overlap.min()).double()
        shifted[positions] = torch.fft.ifft(spectrum * torch.fft.fft(allowed)).real / allowed.sum()
    positions = shifted.abs().gt(1e-9).nonzero()[:, 0]
    return positions, shifted[positions].float()


SETS: dict[str, Callable[[TokenMap], Weighted]] = {
    "evidence": _evidence,
    "visual": _visual,
    "even_mass": _evenly_spread,
    "shifted": _shifted,
}
"""The sets of keys whose mass a metric may need.

evidence  G with the weights of the region's tokens: M_G
visual    V: M_V; the audio tokens where the evidence is in a sound
share     V, each token with the weight |G| / |V|: the mass on G of a head that spreads its visual
          mass evenly
shifted   G averaged over all its shifts within its picture that do not overlap it
"""


# --- sums over keys


def key_weights(
    token_maps: Sequence[TokenMap], columns: Sequence[Column]
) -> Float[Tensor, "batch key column"]:
    """The weight of every key in every column; 0 outside its set. A column of means has weights
    that sum to 1."""
    weights = torch.zeros(len(token_maps), token_maps[0].length, len(columns))
    for sample, token_map in enumerate(token_maps):
        for number, column in enumerate(columns):
            positions, values = SETS[column.tokens](token_map)
            total = float(values.sum()) if column.keys == "mean" else 1.0
            weights[sample, positions, number] = values / (total or 1.0)
    return weights


def masses(
    pattern: Float[Tensor, "batch head row key"],
    weights: Float[Tensor, "batch key column"],
    columns: Sequence[Column],
) -> Float[Tensor, "batch head row column"]:
    """The attention of every row on every column's set of keys, reduced over these keys:

    sum   Σ_j w_j A_ij
    mean  Σ_j w_j A_ij / Σ_j w_j
    max   the largest A_ij of the set
    hit   1 if the key that the row attends to most (of all keys) is in the set
    """
    heads = pattern.shape[1]
    # one matrix product makes all sums and means of a batch at once
    reduced = torch.bmm(pattern.flatten(1, 2), weights).unflatten(1, (heads, -1))
    for number, column in enumerate(columns):
        if column.keys in ("sum", "mean"):
            continue
        member = weights[:, None, None, :, number] > 0
        if column.keys == "max":
            reduced[..., number] = pattern.masked_fill(~member, 0).amax(-1)
        else:
            best = pattern.argmax(-1, keepdim=True)
            hit = member.expand(*pattern.shape).gather(-1, best)[..., 0].to(pattern.dtype)
            reduced[..., number] = torch.where(pattern.isfinite().all(-1), hit, torch.nan)
    return reduced


def over_rows(mass: Float[Tensor, "*any row"], reduce: str) -> Float[Tensor, "*any"]:
    """One number a head: the mean over its rows ("mean"), or the row that has most ("max")."""
    if mass.shape[-1] == 0:
        raise CorelensError(
            "a pattern without rows", "one row or more", "check which rows the sample has"
        )
    if reduce == "max":
        return mass.amax(-1)
    if reduce == "mean":
        return mass.mean(-1)
    raise CorelensError(
        f"reduce={reduce!r}",
        " or ".join(map(repr, REDUCTIONS)),
        "'mean': all rows; 'max': the row that looks hardest",
    )
