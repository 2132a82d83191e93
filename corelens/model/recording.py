"""Hooks that keep activations: in memory, on another device, or streamed to a folder of
safetensors."""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.hooks.points import TOWERS, Hook, HookPoint


def caching_hooks(
    points: Mapping[str, HookPoint],
    cache: MutableMapping[str, Tensor],
    incl_bwd: bool = False,
    device: Any = None,
    remove_batch_dim: bool = False,
    pos_slice: Any = None,
) -> tuple[list[Hook], list[Hook]]:
    """Forward and backward hooks that keep what passes `points` in `cache`.

    Over the steps of a generation, an entry grows along pos: prompt first, then a position a step
    (patterns get a row a step, their keys padded with 0, scores with −inf). A run that begins at
    position 0 begins anew.

    Args:
        device: where to keep it; None leaves it where its layer is.
        remove_batch_dim: drop a batch axis of size 1.
        pos_slice: TransformerLens's Slice, taken of the positions (rows, for patterns) of the
            decoder's points. Of `hook_pattern_rows` the rows at these positions are read and kept
            (zeros where a sample is padded there).
    """

    def keep(x: Tensor, hook: Any, axis: int, backward: bool = False) -> None:
        name = f"{hook.name}_grad" if backward else hook.name
        x = (x[0] if isinstance(x, tuple) else x).detach().to(device)
        positions = hook.ctx.get("positions")
        # A tower point's first axis is no batch, and its positions are none of the decoder's.
        if not name.startswith(TOWERS):
            if pos_slice is not None and name.endswith("hook_pattern_rows"):
                x = _rows_at(x, hook.ctx["rows"], positions, pos_slice)
            elif pos_slice is not None:
                x = pos_slice.apply(x, dim=axis)
            x = x[0] if remove_batch_dim and x.shape[0] == 1 else x
        if not backward and positions is not None and int(positions[0]) and name in cache:
            x = _append(cache[name], x, axis, name)
        cache[name] = x

    forward: list[Hook] = []
    backward: list[Hook] = []
    for name, point in points.items():
        axis = -3 if point.head_axis == 2 else -2
        recorder = partial(keep, axis=axis)
        recorder.whole_prompt = True  # type: ignore[attr-defined]
        if pos_slice is not None:
            recorder.rows = "all"  # type: ignore[attr-defined]
        forward.append((name, recorder))
        if incl_bwd:
            backward.append((name, partial(keep, axis=axis, backward=True)))
    return forward, backward


def of_whole_prompt(handle: Any) -> bool:
    """Whether a hook wants `hook_logits` of the whole prompt, of which `generate` computes the last
    row alone."""
    return getattr(handle.user_hook, "whole_prompt", False)


def _rows_at(
    x: Float[Tensor, "*batch row key"], rows: Tensor, positions: Tensor, pos_slice: Any
) -> Float[Tensor, "*batch kept key"]:
    """The rows of a rows point, [batch, row] of positions, that stand at the positions of a
    slice."""
    wanted = positions[pos_slice.indices(len(positions))]
    same = rows[:, :, None] == wanted[None, None, :].to(rows.device)
    read = same.any(dim=1)  # [batch, kept]
    if not bool(read.any(dim=0).all()):
        among = rows[rows >= 0].unique().tolist()
        raise CorelensError(
            f"pos_slice={pos_slice.slice} of hook_pattern_rows, which does not read the rows "
            f"{wanted[~read.any(dim=0).to(wanted.device)].tolist()[:8]}",
            f"positions among the rows that it reads: {among[:8]}{' …' if len(among) > 8 else ''}",
            "leave model.pattern_rows(…) off, or say these rows there",
        )
    shape = (x.shape[0], *[1] * (x.ndim - 3), len(wanted), 1)
    index, there = (t.reshape(shape).to(x.device) for t in (same.int().argmax(dim=1), read))
    return torch.take_along_dim(x, index, dim=-2) * there


def _append(before: Tensor, new: Tensor, axis: int, name: str) -> Tensor:
    """The earlier steps' positions, then this step's."""
    if name.endswith(("pattern", "pattern_rows", "scores")):
        fill = -torch.inf if name.endswith("scores") else 0.0
        before = torch.nn.functional.pad(before, (0, new.shape[-1] - before.shape[-1]), value=fill)
    return torch.cat([before, new], dim=axis)


class DiskDict(MutableMapping[str, Tensor]):
    """Names → tensors, each in its own safetensors file in a folder, read when it is asked for.

    Args:
        folder: made if it is not there.
        device: where tensors are read to.
        new: the folder must not hold tensors yet.
    """

    def __init__(self, folder: str | Path, device: Any = None, new: bool = True):
        self.folder, self.device = Path(folder), device
        self.folder.mkdir(parents=True, exist_ok=True)
        if new and any(self.folder.glob("*.safetensors")):
            raise CorelensError(
                f"the folder {str(folder)!r}, which holds tensors already",
                "a new or empty folder",
                "name another one",
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; no file is read."""
        return isinstance(name, str) and self._path(name).is_file()

    def __getitem__(self, name: str) -> Float[Tensor, "..."]:
        """Read one tensor."""
        if name not in self:
            raise KeyError(name)
        with safe_open(self._path(name), framework="pt", device=str(self.device or "cpu")) as file:
            return file.get_tensor(name)

    def __setitem__(self, name: str, x: Tensor) -> None:
        """Write one tensor."""
        write_whole(self._path(name), save({name: x.detach().cpu().contiguous()}))

    def __delitem__(self, name: str) -> None:
        """Remove one tensor's file."""
        self._path(name).unlink()

    def __iter__(self) -> Iterator[str]:
        """The names, sorted."""
        return iter(
            sorted(
                path.name.removesuffix(".safetensors") for path in self.folder.glob("*.safetensors")
            )
        )

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(list(self.folder.glob("*.safetensors")))

    def note(self, **facts: Any) -> None:
        """Write facts about the run beside the tensors."""
        write_whole(self.folder / "cache.json", json.dumps(facts, indent=2))

    def facts(self) -> dict[str, Any]:
        """What `note` wrote."""
        path = self.folder / "cache.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def finite_hooks(points: Mapping[str, HookPoint]) -> list[Hook]:
    """Hooks that raise at the first point whose tensor holds NaN or infinity."""

    def finite(x: Any, hook: Any) -> None:
        if isinstance(x, Tensor) and not torch.isfinite(x).all():
            bad = (~torch.isfinite(x)).nonzero()
            raise CorelensError(
                f"{len(bad)} of {x.numel()} numbers at {hook.name!r} are NaN or infinite, first "
                f"at {bad[0].tolist()} "
                f"of {list(x.shape)}",
                "finite activations",
                "look at the hooks and weights just before this point; float16 overflows where "
                "bfloat16 does not",
            )

    return [(name, finite) for name in points]
