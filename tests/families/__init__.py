"""A tiny random model of every multimodal type of transformers, and what is checked on it."""
