"""From heads to speed: some heads attend fully, the others under a pattern, and the KV cache holds
what is needed."""

from corelens.sparse.block_sparse import BlockSparse
from corelens.sparse.budget import KVBudget
from corelens.sparse.inference import SparseInference
from corelens.sparse.intra_image import IntraImage
from corelens.sparse.patterns import Pruned, Streaming
from corelens.sparse.routing import full_layers
from corelens.sparse.vertical_slash import VerticalSlash
from corelens.sparse.visual_tokens import PruneVisual

__all__ = [
    "BlockSparse",
    "IntraImage",
    "KVBudget",
    "PruneVisual",
    "Pruned",
    "SparseInference",
    "Streaming",
    "VerticalSlash",
    "full_layers",
]
