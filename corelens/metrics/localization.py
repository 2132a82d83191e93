"""Localization heads: much attention on the picture, gathered in few places. No ground truth is needed."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from corelens.metrics.mass import mass_on, over_rows
from corelens.tokens import TokenMap

CHOSEN = 10  # heads of lowest entropy that a sample votes for


def localization(
    pattern: Float[Tensor, "head row key"], token_map: TokenMap, threshold: float = 0.001
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """(attention on the picture, spatial entropy of its map) of the last row; `votes` makes the score of them.

    The entropy is −Σ_C p_C ln p_C over the connected components (8 neighbours) of what exceeds the map's mean by
    `threshold`, p_C the component's share of all that exceeds the mean; in nats, low when the head looks at one place.
    Source: Kang et al. 2025, "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual Grounding",
    arXiv 2503.06287, and its published code, with two differences: a map in which nothing exceeds the threshold, and
    one that lights up the whole bottom row (a sink, not a place), count as scattered (there: entropy 0; a flag).
    """
    row = pattern.mean(1, keepdim=True)
    attention = row[:, 0].index_select(-1, token_map.visual.to(row.device)).float().cpu().numpy().astype(np.float64)
    entropy = [spatial_entropy(one, token_map, threshold) for one in attention]
    return over_rows(mass_on(row, token_map.visual), "mean"), torch.tensor(entropy, device=row.device, dtype=row.dtype)


def spatial_entropy(attention: Float[np.ndarray, " visual"], token_map: TokenMap, threshold: float = 0.001) -> float:
    """Spatial entropy in nats of attention on the visual tokens; if scattered ln(tokens) + 1, more than any map has."""
    scattered = float(np.log(len(attention)) + 1)
    above = np.clip(attention - attention.mean(), 0, None)
    lit = above > threshold
    neighbours, bottom = _geometry(token_map)
    if not lit.any() or lit[bottom].all():
        return scattered
    count, component = connected_components(neighbours[lit][:, lit], directed=False)
    share = np.bincount(component, weights=above[lit], minlength=count) / above.sum()
    return float(-(share * np.log(share)).sum())


def votes(parts: Float[np.ndarray, "part sample layer head"]) -> Float[np.ndarray, "sample layer head"]:
    """1 for the ten heads of lowest entropy in each sample, among those that look at the picture; 0 for the rest.

    Which heads look at the picture is decided once, for all samples: those whose mean mass lies at or above the elbow
    of the sorted means. The mean of the votes is the selection frequency by which the paper ranks heads. Published
    code compares head numbers with the elbow's head number instead of masses with the elbow's mass; the paper's text
    is followed here.
    """
    mass, entropy = parts
    looks = mass.mean(0) >= elbow(mass.mean(0).ravel())
    order = np.where(looks, entropy, np.inf).reshape(len(entropy), -1)
    k = min(CHOSEN, int(looks.sum()))
    found = np.zeros_like(order, dtype=np.float32)
    np.put_along_axis(found, np.argsort(order, axis=1, kind="stable")[:, :k], 1, axis=1)
    return found.reshape(entropy.shape)


def elbow(values: Float[np.ndarray, " head"]) -> float:
    """The value where the sorted curve is farthest from the line between its ends."""
    curve = np.sort(values.astype(np.float64))
    chord = np.linspace(curve[0], curve[-1], len(curve))
    return float(curve[np.argmax(np.abs(curve - chord))])  # vertical and perpendicular distance peak at one place


@lru_cache(maxsize=16)
def _geometry(token_map: TokenMap) -> tuple[csr_matrix, Bool[np.ndarray, " visual"]]:
    """Which visual tokens touch (8 neighbours, within a picture, a view and a frame), and which are the bottom row."""
    token_map.images  # noqa: B018 (raises if this model's geometry is not known)
    pictures = token_map.pictures or []
    order = {int(position): i for i, position in enumerate(token_map.visual)}
    rows, columns = [], []
    bottom = np.zeros(len(order), dtype=bool)
    for picture in pictures:
        box, place = picture.box.numpy(), np.array([order[int(p)] for p in picture.positions])
        size = box[:, 2:] - box[:, :2]
        frame = np.zeros(len(box)) if picture.frames is None else picture.frames[:, 0].numpy()
        real = (size > 0).all(1)
        slack = 0.01 * size[real].min()
        for i in np.flatnonzero(real):
            gap = np.maximum(box[:, :2] - box[i, 2:], box[i, :2] - box[:, 2:]).max(1)
            alike = (np.abs(size - size[i]) < 0.1 * size[i]).all(1)  # of one view: a thumbnail's cells are larger
            touching = np.flatnonzero(real & alike & (gap <= slack) & (frame == frame[i]))
            rows += [place[i]] * len(touching)
            columns += place[touching].tolist()
        lowest = box[real, 3].max()
        finest = size[:, 1] <= size[real, 1].min() * 1.1
        bottom[place[real & finest & (box[:, 3] >= lowest - slack)]] = True
    shape = (len(order), len(order))
    return csr_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=shape), bottom
