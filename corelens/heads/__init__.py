"""Heads, sets of heads, scores of heads, their intervals and files."""

from corelens.heads.head_set import Head, HeadSet
from corelens.heads.scores import Agreement, HeadScores
from corelens.heads.serving import full_heads, read_full_heads, write_full_heads

__all__ = [
    "Agreement",
    "Head",
    "HeadScores",
    "HeadSet",
    "full_heads",
    "read_full_heads",
    "write_full_heads",
]
