"""HookedMLLM: the wrapped Hugging Face model, its hook points wired to its modules, its weights and
its cache."""

from corelens.model.bound import bind
from corelens.model.cache import ActivationCache
from corelens.model.hooked import HookedMLLM

__all__ = ["ActivationCache", "HookedMLLM", "bind"]
