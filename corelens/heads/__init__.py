"""Heads, sets of heads, scores of heads, their intervals and files."""

from corelens.heads.head_set import Head, HeadSet
from corelens.heads.scores import Agreement, HeadScores

__all__ = ["Agreement", "Head", "HeadScores", "HeadSet"]
