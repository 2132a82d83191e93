"""HookedMLLM: the wrapped Hugging Face model, its hook points wired to its modules, its weights and
its cache."""
