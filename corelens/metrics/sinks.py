"""Visual sinks: tokens of a picture that draw attention whatever is asked. Found, shown, and left
out by option."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs, Sample
from corelens.tokens.regions import Box
from corelens.tokens.token_map import TokenMap

# none of them asks for one place in the picture
QUESTIONS = ("N/A", "Describe the picture.", "What is this?")
THRESHOLD = 5.0  # times the mean attention of the picture's tokens
ROWS = "question+last"


def without(token_map: TokenMap, sinks: Int[Tensor, " sink"]) -> TokenMap:
    """The same map without these visual tokens (indices into `token_map.visual`): not in V, G, or
    any picture."""
    positions = token_map.visual[sinks]

    def rest(tokens: Int[Tensor, " token"]) -> Tensor:
        return ~torch.isin(tokens, positions)

    pictures = token_map.pictures
    if pictures is not None:
        pictures = [
            replace(
                picture,
                positions=picture.positions[rest(picture.positions)],
                box=picture.box[rest(picture.positions)],
                frames=None if picture.frames is None else picture.frames[rest(picture.positions)],
                views=None if picture.views is None else picture.views[rest(picture.positions)],
            )
            for picture in pictures
        ]
    covered = [
        (tokens[rest(tokens)], weights[rest(tokens)]) for tokens, weights in token_map.covered
    ]
    return replace(
        token_map,
        visual=token_map.visual[rest(token_map.visual)],
        pictures=pictures,
        covered=covered,
    )


@dataclass(eq=False)
class VisualSinks:
    """The visual sinks of some samples.

    Args:
        samples: whose pictures were looked at.
        strengths: per sample and visual token the attention that it draws, in times the mean of the
            picture's tokens:
            the least over the questions. (Attention: the mean over layers, heads, question rows and
            the last row.)
        threshold: from this strength on a token is a sink.
        inputs: the samples, prepared one by one, for the picture.
        questions: what was asked.
    """

    samples: list[Sample]
    strengths: list[Float[np.ndarray, " visual"]]
    threshold: float
    inputs: list[Inputs]
    questions: tuple[str, ...]

    @property
    def tokens(self) -> list[Int[Tensor, " sink"]]:
        """Per sample its sinks, as indices into `token_map.visual`."""
        return [
            torch.from_numpy(np.flatnonzero(strength >= self.threshold))
            for strength in self.strengths
        ]

    @property
    def share(self) -> Float[np.ndarray, " sample"]:
        """Per sample the share of visual attention that goes to its sinks, by the strengths
        above."""
        return np.array(
            [s[s >= self.threshold].sum() / max(s.sum(), 1e-12) for s in self.strengths]
        )

    def boxes(self, number: int = 0) -> list[Box]:
        """What the sinks of a sample cover, in pixels of the original picture."""
        token_map = self.inputs[number].token_maps[0]
        cells = [token_map.cell(int(token_map.visual[i])) for i in self.tokens[number]]
        of_video = any(picture.frames is not None for picture in token_map.pictures or [])
        return [
            Box(*cell[1:], image=0 if of_video else cell[0]) for cell in cells if cell[3] > cell[1]
        ]

    def _repr_html_(self) -> str:
        from corelens.viz.view import image_html

        return f"{image_html(self.plot(), 'visual sinks')}<p>{escape(repr(self))}</p>"

    def plot(self, number: int = 0) -> Any:
        """The first picture of a sample with the strengths on it and its sinks outlined, a
        matplotlib figure."""
        from corelens.viz.sinks import sinks_figure

        return sinks_figure(self, number)

    def __repr__(self) -> str:
        counts = [len(tokens) for tokens in self.tokens]
        return (
            f"VisualSinks({len(self.samples)} samples, {np.mean(counts):.1f} sinks a sample on "
            "average "
            f"(at {self.threshold:g} times the mean), which draw {self.share.mean():.0%} of visual "
            "attention)"
        )


def visual_sinks(
    model: Any,
    samples: Sequence[Sample] | Sample,
    questions: Sequence[str] = QUESTIONS,
    threshold: float = THRESHOLD,
    batch_size: int = 8,
    hooks: Sequence[Hook] = (),
) -> VisualSinks:
    """Find the tokens of each sample's picture that draw attention whatever is asked.

    Each picture is shown with each of `questions`. A visual token is a sink if under every question
    the attention on it (mean over all layers, heads, and the question's and last rows) is at least
    `threshold` times the mean over the picture's tokens. A metric leaves them out by option:
    `cl.metric("ram", sinks="left_out")`.

    Args:
        model: a HookedMLLM.
        samples: whose pictures; their own questions are not asked.
        questions: none should ask for one place, or what is found is retrieval.
        threshold: in times the mean.
        batch_size: samples a forward.
        hooks: to run under.
    Raises:
        CorelensError: a sample that is a chat: its question cannot be replaced.

    The phenomenon: Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large
    Multimodal Models", arXiv 2503.03321, who find sinks by massive activations in dimensions that
    each model has its own of. This rule is ours and needs none.
    """
    samples = [samples] if isinstance(samples, Sample) else list(samples)
    chats = [sample.id for sample in samples if sample.messages is not None]
    if chats or not samples or not questions:
        raise CorelensError(
            f"sample {chats[0]!r} which is a chat"
            if chats
            else f"{len(samples)} samples, {len(questions)} questions",
            "samples with a question that can be replaced, and one question or more to ask instead",
            "give images= and question=",
        )
    strengths: list[np.ndarray] = []
    inputs: list[Inputs] = []
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            each = []
            for question in questions:
                each.append(
                    _strengths(
                        model, [replace(sample, question=question) for sample in batch], hooks
                    )
                )
            strengths += [np.min(of_sample, axis=0) for of_sample in zip(*each, strict=True)]
            inputs += [model.prepare(sample) for sample in batch]
    return VisualSinks(samples, strengths, threshold, inputs, tuple(questions))


def _strengths(
    model: Any, samples: list[Sample], hooks: Sequence[Hook]
) -> list[Float[np.ndarray, " visual"]]:
    """Per sample the attention on each visual token over the mean of them, in one run."""
    total: dict[int, Tensor] = {}

    def add_rows(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        # [batch, row]: padded rows are zero, and do not count
        real = (hook.ctx["rows"] >= 0).to(pattern)
        of_layer = pattern.detach().mean(1).sum(1) / real.sum(1, keepdim=True)
        total[hook.layer()] = of_layer  # [batch, key]

    add_rows.rows = ROWS  # type: ignore[attr-defined]
    prepared = model.prepare(samples)
    reading: list[Hook] = [*hooks, (lambda name: name.endswith("attn.hook_pattern_rows"), add_rows)]
    model.run_with_hooks(prepared, fwd_hooks=reading, return_type=None)
    attention = torch.stack([of_layer.cpu() for of_layer in total.values()]).mean(0)
    strengths = [
        line[token_map.visual].double()
        for line, token_map in zip(attention, prepared.token_maps, strict=True)
    ]
    return [(line / line.mean().clamp(min=1e-12)).numpy() for line in strengths]
