"""The optimizer of demo models: AdamW, or Muon for matrices and AdamW for all else."""

from typing import Any

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW of the weights of `modules` or, with `muon`, Muon of their matrices: of its momentum it
    takes the nearest orthogonal matrix (Jordan 2024), scaled to AdamW's step (Liu et al. 2025,
    arXiv 2502.16982). Embeddings, probes, norms and biases stay AdamW's. A patch embedding's
    filters are a matrix too, and gain the most.

    Args:
        modules: what learns.
        muon: Muon's rate, as a multiple of AdamW's; 0: no Muon.
        spared: weights that are AdamW's in any case.
    """

    def __init__(
        self, modules: nn.Module, muon: float = 0.0, spared: nn.Module | None = None
    ) -> None:
        self._names = dict(modules.named_parameters())
        embeddings = [part for part in modules.modules() if isinstance(part, nn.Embedding)]
        for_adamw = {
            id(weight)
            for part in [*embeddings, spared or nn.Module()]
            for weight in part.parameters()
        }
        matrices = [
            w for w in self._names.values() if muon and w.ndim > 1 and id(w) not in for_adamw
        ]
        for_muon = {id(weight) for weight in matrices}
        others = [weight for weight in self._names.values() if id(weight) not in for_muon]
        # Muon takes matrices only; these parameters share the weights' memory.
        self._flat = {id(w): nn.Parameter(w.detach().flatten(1)) for w in matrices}
        self._matrices, self._muon = matrices, muon
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        ]
        if matrices:
            flat = list(self._flat.values())
            self._parts.append(
                torch.optim.Muon(flat, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )

    def step(self, rate: float, clip: float) -> None:
        """One step at AdamW's `rate`, after clipping the gradients' norm; forgets the gradients."""
        weights = list(self._names.values())
        nn.utils.clip_grad_norm_(weights, clip)
        for weight in self._matrices:
            self._flat[id(weight)].grad = None if weight.grad is None else weight.grad.flatten(1)
        for part, factor in zip(self._parts, (1.0, self._muon), strict=False):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
        for weight in weights:
            weight.grad = None

    def moments(self) -> dict[str, Tensor]:
        """What it remembers, under "<kind>/<weight's name>"."""
        return {
            f"{kind}/{name}": value
            for name, weight in self._names.items()
            for kind, value in self._state(weight).items()
        }

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` gave."""
        for key, value in moments.items():
            kind, name = key.split("/", 1)
            weight = self._names[name]
            self._state(weight)[kind] = value.to(weight.device)

    def _state(self, weight: Tensor) -> dict[str, Any]:
        flat = self._flat.get(id(weight))
        return self._parts[0].state[weight] if flat is None else self._parts[1].state[flat]
