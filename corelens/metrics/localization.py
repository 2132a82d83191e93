"""Localization heads: much attention on the picture, gathered in few places. No ground truth is
needed."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.tokens.token_map import TokenMap

CHOSEN = 10  # heads of lowest entropy that a sample votes for


def localization(
    pattern: Float[Tensor, "head row key"], token_map: TokenMap, threshold: float = 0.001
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """(attention on the picture, spatial entropy of its map) of the last row; `votes` makes the
    score of them.

    The entropy is −Σ_C p_C ln p_C over the connected components (8 neighbours) of what exceeds the
    map's mean by `threshold`, p_C the component's share of all that exceeds the mean; in nats, low
    when the head looks at one place. Source: Kang et al. 2025, "Your Large Vision-Language Model
    Only Needs A Few Attention Heads For Visual Grounding", arXiv 2503.06287, and its published
    code, with two differences: a map in which nothing exceeds the threshold, and one that lights up
    the whole bottom row (a sink, not a place), count as scattered (there: entropy 0; a flag).
    """
    on_picture = pattern.index_select(-1, token_map.visual.to(pattern.device)).mean(1)
    entropy = spatial_entropy(on_picture.double().cpu().numpy(), token_map, threshold)
    return on_picture.sum(-1), torch.tensor(entropy, device=pattern.device, dtype=pattern.dtype)


def spatial_entropy(
    attention: Float[np.ndarray, "head visual"], token_map: TokenMap, threshold: float = 0.001
) -> Float[np.ndarray, " head"]:
    """Spatial entropy in nats of attention on the visual tokens; if scattered ln(tokens) + 1, more
    than any map has."""
    from scipy.sparse import coo_matrix  # SciPy is slow to import
    from scipy.sparse.csgraph import connected_components

    above = np.clip(attention - attention.mean(1, keepdims=True), 0, None)
    lit = above > threshold
    (a, b), bottom = _geometry(token_map)
    # of the lit tokens of all heads: the nodes of one graph
    number = np.cumsum(lit).reshape(lit.shape) - 1
    head, edge = (lit[:, a] & lit[:, b]).nonzero()
    edges = number[head, a[edge]], number[head, b[edge]]
    graph = coo_matrix((np.ones(len(edge), dtype=bool), edges), shape=(int(lit.sum()),) * 2)
    count, component = connected_components(graph, directed=False)
    head_of = np.zeros(count, dtype=int)
    head_of[component] = lit.nonzero()[0]
    share = np.bincount(component, weights=above[lit], minlength=count) / above.sum(1)[head_of]
    entropy = np.bincount(head_of, weights=-share * np.log(share), minlength=len(lit))
    scattered = ~lit.any(1) | lit[:, bottom].all(1)
    return np.where(scattered, np.log(lit.shape[1]) + 1, entropy)


def votes(
    parts: Float[np.ndarray, "part sample layer head"],
) -> Float[np.ndarray, "sample layer head"]:
    """1 for the ten heads of lowest entropy in each sample, among those that look at the picture; 0
    for the rest.

    Which heads look at the picture is decided once, for all samples: those whose mean mass lies at
    or above the elbow of the sorted means. The mean of the votes is the selection frequency by
    which the paper ranks heads. Published code compares head numbers with the elbow's head number
    instead of masses with the elbow's mass; the paper's text is followed here.
    """
    mass, entropy = parts
    looks = mass.mean(0) >= elbow(mass.mean(0).ravel())
    order = np.where(looks, entropy, np.inf).reshape(len(entropy), -1)
    k = min(CHOSEN, int(looks.sum()))
    voted = np.zeros_like(order, dtype=np.float32)
    np.put_along_axis(voted, np.argsort(order, axis=1, kind="stable")[:, :k], 1, axis=1)
    return voted.reshape(entropy.shape)


def elbow(values: Float[np.ndarray, " head"]) -> float:
    """The value where the sorted curve is farthest from the line between its ends."""
    curve = np.sort(values.astype(np.float64))
    chord = np.linspace(curve[0], curve[-1], len(curve))
    # vertical and perpendicular distance peak at one place
    return float(curve[np.argmax(np.abs(curve - chord))])


@lru_cache(maxsize=16)
def _geometry(token_map: TokenMap) -> tuple[Int[np.ndarray, "2 pair"], Bool[np.ndarray, " visual"]]:
    """The pairs of visual tokens that touch (8 neighbours, within a picture, a view and a frame);
    the bottom row."""
    from scipy.spatial import cKDTree

    token_map.images  # noqa: B018 (raises if this model's geometry is not known)
    n = len(token_map.visual)
    pairs, bottom = [np.empty((0, 2), dtype=int)], np.zeros(n, dtype=bool)
    for picture in token_map.pictures or []:
        index = torch.searchsorted(token_map.visual, picture.positions).numpy()
        box = picture.box.double().numpy()
        real = (box[:, 2:] > box[:, :2]).all(1)  # the others see padding only
        frame = np.zeros(len(box)) if picture.frames is None else picture.frames[:, 0].numpy()
        index, box, frame = index[real], box[real], frame[real]
        size = box[:, 2:] - box[:, :2]
        slack = 0.01 * size.min()
        reach = 1.01 * size.max() + slack  # no two cells that touch lie farther apart
        # frames out of each other's reach
        centres = np.column_stack([box[:, :2] + size / 2, frame * 3 * reach])
        near = cKDTree(centres).query_pairs(reach, p=np.inf, output_type="ndarray")
        i, j = near[:, 0], near[:, 1]  # i before j
        gap = np.maximum(box[i, :2] - box[j, 2:], box[j, :2] - box[i, 2:]).max(1)
        view = _views(near[gap < -slack], len(box))
        pairs.append(index[near[(np.abs(gap) <= slack) & (view[i] == view[j])]])
        finest = view == np.bincount(view).argmax()
        bottom[index[finest & (box[:, 3] >= box[finest, 3].max() - slack)]] = True
    return np.concatenate(pairs).T.copy(), bottom


def _views(overlaps: Int[np.ndarray, "pair 2"], n: int) -> Int[np.ndarray, " token"]:
    """Which view of its picture (tiles, thumbnail) each cell belongs to, in the order of the
    prompt: the cells of one view do not overlap, and with the first cell that does another view
    begins."""
    view, start = np.zeros(n, dtype=int), 0
    while True:
        again = overlaps[overlaps[:, 0] >= start, 1]
        if not len(again):
            return view
        start = int(again.min())
        view[start:] += 1


LOCALIZATION = Metric(
    "localization",
    localization,
    needs=("pattern", "token_map"),
    rows="last",
    options={"threshold": 0.001},
    region=False,
    finish=votes,
)
