"""QK-clip: attention logits that cannot run away, for decoders without a norm on queries and keys
(Qwen2's).

Logits that grow without bound make attention pick one key for good; no gradient reaches the others
any more, and what was not learned by then never is. After a step the queries of a head whose logits
could pass the limit are scaled down to it (Kimi Team 2025, arXiv 2507.20534, with the bound ‖q‖ ·
‖k‖ · scale in place of the largest logit).
"""

from typing import Any

import torch
from torch import Tensor


class QKClip:
    """Watches the decoder of `model` and holds its logits' bound to `limit`; of attention with a
    QK-norm, nothing.

    `step` after each step of the optimizer: q's weights (and biases) of head h are multiplied by
    min(1, limit / (max ‖q_h‖ · max ‖k_g(h)‖ · scale)), the maxima over the batch of the last
    forward.
    """

    def __init__(self, model: Any, limit: float):
        self._limit = limit
        self._largest: dict[Any, Tensor] = {}
        modules = model.model.language_model.modules()
        self._attention = [m for m in modules if hasattr(m, "q_proj") and not hasattr(m, "q_norm")]
        self._hooks = [
            part.register_forward_hook(self._watch(attn.head_dim))
            for attn in self._attention
            for part in (attn.q_proj, attn.k_proj)
        ]

    def _watch(self, width: int) -> Any:
        def look(module: Any, args: Any, out: Tensor) -> None:
            if out.requires_grad:  # evaluation does not count
                heads = out.detach().float().unflatten(-1, (-1, width)).norm(dim=-1)
                self._largest[module] = heads.flatten(0, -2).amax(0)

        return look

    @torch.no_grad()
    def step(self) -> None:
        """Scale the queries of heads that passed the limit; forgets what was seen."""
        for attn in self._attention:
            if attn.q_proj not in self._largest:
                continue
            q, k = self._largest[attn.q_proj], self._largest[attn.k_proj]
            bound = q * k.repeat_interleave(len(q) // len(k)) * attn.scaling
            factor = (self._limit / bound).clamp(max=1.0).repeat_interleave(attn.head_dim)
            attn.q_proj.weight.mul_(factor[:, None])
            if attn.q_proj.bias is not None:
                attn.q_proj.bias.mul_(factor)
        self._largest.clear()

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
