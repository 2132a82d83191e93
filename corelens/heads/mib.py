"""Node scores in the JSON of MIB's circuit track (arXiv 2504.13151; `Graph.to_json` of
hannamw/EAP-IG).

    {"cfg": {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"}, "nodes": {"input": {"in_graph":
     true}, "a0.h0": {"in_graph": true, "score": 0.12}, …, "m0": {"in_graph": true},
               …, "logits": {"in_graph": true}},
     "edges": {}}

Layers and heads count from 0. A node without a score is NaN there, and MIB keeps it in every
circuit: so the input and the MLPs, which are no heads, have none. Edges are left empty: at the
level of nodes MIB makes them from the nodes.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet


def write_nodes(
    path: str | os.PathLike, values: Float[np.ndarray, "layer head"], circuit: HeadSet, d_model: int
) -> None:
    """Write scores of heads as node scores; a head that does not exist (NaN) is a node without a
    score."""
    n_layers, n_heads = values.shape
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True}}
    for layer in range(n_layers):
        for head in range(n_heads):
            score = float(values[layer, head])
            nodes[f"a{layer}.h{head}"] = {"in_graph": (layer, head) in circuit} | (
                {} if np.isnan(score) else {"score": score}
            )
        nodes[f"m{layer}"] = {"in_graph": True}
    nodes["logits"] = {"in_graph": True}
    cfg = {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": False, "d_model": d_model}
    write_whole(path, json.dumps({"cfg": cfg, "nodes": nodes, "edges": {}}))


def read_nodes(path: str | os.PathLike) -> tuple[Float[np.ndarray, "layer head"], dict[str, Any]]:
    """(scores of heads, NaN where a node has none; meta) of a circuit with node scores.

    Raises:
        CorelensError: another file, a circuit of edges or neurons without scores of nodes, heads
            outside `cfg`.
    """
    path = Path(path)
    if not path.exists():
        raise CorelensError(
            f"{path}, which does not exist", "a circuit in MIB's JSON", "check the path"
        )
    try:
        circuit = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # (UnicodeDecodeError is one)
        raise _wrong(path, f"no JSON ({error})") from error
    if not isinstance(circuit, dict) or not {"cfg", "nodes"} <= circuit.keys():
        raise _wrong(path, "no object with cfg and nodes")
    cfg, nodes = circuit["cfg"], circuit["nodes"]
    try:
        values = np.full((int(cfg["n_layers"]), int(cfg["n_heads"])), np.nan, dtype=np.float32)
        for name, node in nodes.items():
            head = re.fullmatch(r"a(\d+)\.h(\d+)", name)
            if head and node.get("score") is not None:
                values[int(head[1]), int(head[2])] = float(node["score"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _wrong(path, f"{type(error).__name__}: {error}") from error
    if np.isnan(values).all():
        raise _wrong(path, "no node of a head with a score (a circuit of edges?)")
    meta = {"metric": "mib", "key": "mib", "source": os.fspath(path), "d_model": cfg.get("d_model")}
    return values, meta


def _wrong(path: Path, problem: str) -> CorelensError:
    return CorelensError(
        f"{path}: {problem}",
        'MIB\'s JSON: {"cfg": {"n_layers", "n_heads"}, "nodes": {"a0.h0": {"score": …}}}',
        "give a file of node scores (Graph.to_json, or HeadScores.to_mib)",
    )
