"""Heads, sets of heads, scores of heads, their intervals and files."""
