"""PatchResult: what a sweep of patches measured, with a name on every axis."""

import json
import os
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.disk.checksum import open_sealed, sealed
from corelens.disk.write import write_whole
from corelens.errors import CorelensError

FORMAT, VERSION = "corelens.patch_result", 1


@dataclass(eq=False)
class PatchResult:
    """The metric under each patch of a sweep, with a name and labels for every axis.

    Args:
        values: float32 [sample, *axes]: the metric of each sample under each patch.
        base: float32 [sample]: the metric of the run that was patched, unpatched.
        other: float32 [sample]: the metric of the run the patched-in values come from.
        axes: {name: labels}, in the order of the axes of `values` behind the samples; {} if all was
            patched at once.
        samples: the samples' names.
        meta: what was done: direction, site, metric, model.
    """

    values: Float[np.ndarray, "sample *axes"]
    base: Float[np.ndarray, " sample"]
    other: Float[np.ndarray, " sample"]
    axes: dict[str, list[str]]
    samples: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the axes of `values`."""
        return ("sample", *self.axes)

    @property
    def effect(self) -> Float[np.ndarray, "sample *axes"]:
        """The metric under the patch minus that of the unpatched run, [sample, *axes]."""
        return self.values - self._by_sample(self.base)

    @property
    def recovered(self) -> Float[np.ndarray, "sample *axes"]:
        """0 where the patch does nothing, 1 where it makes the metric that of the other run,
        [sample, *axes].

        NaN for a sample in which the two runs do not differ.
        """
        gap = self._by_sample(self.other - self.base)
        return np.divide(self.effect, gap, out=np.full_like(self.values, np.nan), where=gap != 0)

    def _by_sample(self, x: np.ndarray) -> np.ndarray:
        """One number a sample, shaped to broadcast over the axes."""
        return x.reshape(-1, *[1] * len(self.axes))

    def top(self, k: int = 10) -> list[tuple[dict[str, str], float]]:
        """The k patches of largest mean effect, by absolute value: ({axis: label}, effect)."""
        mean = self.effect.mean(0)
        order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:k]
        largest = []
        for index in zip(*np.unravel_index(order, mean.shape), strict=True) if mean.ndim else [()]:
            labels = {name: self.axes[name][i] for name, i in zip(self.axes, index, strict=True)}
            largest.append((labels, float(mean[index])))
        return largest

    def select(self, **labels: str | int) -> "PatchResult":
        """The part at these labels: `result.select(layer=3)` has one axis less."""
        values, axes = self.values, dict(self.axes)
        for name, label in labels.items():
            if name not in axes or str(label) not in axes[name]:
                raise CorelensError(
                    f"{name}={label!r}",
                    f"an axis among {list(axes)}"
                    if name not in axes
                    else f"one of {axes[name][:12]}",
                    "result.axes has the labels",
                )
            axis = 1 + list(axes).index(name)
            values = values.take(axes.pop(name).index(str(label)), axis=axis)
        return PatchResult(
            values, self.base, self.other, axes, self.samples, self.meta | {"selected": labels}
        )

    def __repr__(self) -> str:
        shape = (
            " × ".join(f"{len(labels)} {name}s" for name, labels in self.axes.items())
            or "one patch"
        )
        largest = []
        for labels, effect in self.top(3):
            entry = " ".join(f"{name} {label}" for name, label in labels.items())
            largest.append(f"{entry}: {effect:+.3f}".removeprefix(": "))
        best = ", ".join(largest)
        about = f"{self.meta.get('direction', 'patching')} {self.meta.get('site', '')}".strip()
        metric = self.meta.get("metric", "effect")
        return f"PatchResult({about}: {shape}, {len(self.base)} samples; {metric} {best})"

    def _repr_html_(self) -> str:
        """The figure, and the largest effects in words."""
        from corelens.viz.view import image_html

        image = image_html(self.plot(), repr(self)) if 1 <= len(self.axes) <= 2 else ""
        return f'<div>{image}<pre style="white-space:pre-wrap">{escape(repr(self))}</pre></div>'

    # --- pictures

    def plot(self, what: str = "effect", ax: Any = None) -> Any:
        """The mean over samples as a matplotlib figure: bars for one axis, a grid for two; see
        `cl.viz.patch_heatmap`.

        Args:
            what: "effect", "recovered" or "values".
            ax: matplotlib axes to draw on.
        """
        from corelens.viz.patch_effects import patch_heatmap

        return patch_heatmap(self, what=what, ax=ax)

    def plot_against(self, exact: "PatchResult", ax: Any = None) -> Any:
        """A scatter of these effects against those of another result of the same axes (the exact
        one)."""
        from corelens.viz import style

        if self.axes != exact.axes:
            raise CorelensError(
                f"axes {list(exact.axes)}",
                f"the same axes and labels as {list(self.axes)}",
                "use one `per`",
            )
        effects, exact_effects = self.effect.mean(0).ravel(), exact.effect.mean(0).ravel()
        with style.axes(ax, 3.6, 3.4) as ax:
            low = min(effects.min(), exact_effects.min())
            high = max(effects.max(), exact_effects.max())
            ax.plot([low, high], [low, high], color=style.SOFT, linewidth=0.8)
            ax.scatter(exact_effects, effects, s=12, color=style.BLUE, alpha=0.7, linewidths=0)
            ax.set(
                xlabel=f"{exact.meta.get('method', 'exact')} effect",
                ylabel=f"{self.meta.get('method', 'estimated')} effect",
            )
            if len(effects) > 1 and effects.std() > 0 and exact_effects.std() > 0:
                ax.set_title(f"r = {np.corrcoef(effects, exact_effects)[0, 1]:.3f}")
        return style.figure_of(ax)

    # --- files

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file: values, base, other, and a JSON header with axes, samples and
        meta."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "axes": self.axes,
            "samples": self.samples,
            "meta": self.meta,
        }
        tensors = {"values": self.values, "base": self.base, "other": self.other}
        arrays = {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()}
        words = json.dumps(header, ensure_ascii=False, default=str)
        write_whole(path, sealed(arrays, {"corelens": words}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PatchResult":
        """Read what `save` wrote."""
        tensors, metadata = open_sealed(path)
        try:
            header = json.loads(metadata.get("corelens", "null"))
        except ValueError:
            header = None
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise CorelensError(
                f"{path}, which holds no patching result of version {VERSION}",
                "a file that PatchResult.save wrote",
                "check it",
            )
        return cls(**tensors, axes=header["axes"], samples=header["samples"], meta=header["meta"])
