"""From heads to speed: some heads attend fully, the others under a pattern, and the KV cache holds
what is needed."""

from corelens.sparse.block_sparse import BlockSparse
from corelens.sparse.budget import KVBudget
from corelens.sparse.inference import SparseInference
from corelens.sparse.patterns import Pruned, Streaming

__all__ = ["BlockSparse", "KVBudget", "Pruned", "SparseInference", "Streaming"]
