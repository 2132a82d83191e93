"""Which token of a row is which part of which picture. Pure geometry: no model, no processor, no
family.

Positions speak of the padded row. Boxes are in pixels of the original picture: x0, y0, x1, y1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.cells import THUMBNAIL, Picture
from corelens.tokens.regions import no_region
from corelens.tokens.sounds import SoundTokens

WORDS = ("question", "last", "answer", "visual", "audio", "region", "text", "template", "all")
NAMES = (*WORDS, "image:1", "frame:3", "thumbnail", "tile:0")
Positions = str | int | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class TokenMap:
    """One sample's row of tokens. All positions are 1-D LongTensors on the CPU, ascending, in the
    padded row.

    `question`, `answer`, `images`, `regions`, `region_weights` and `region` raise a CorelensError
    that says what the sample lacks. Made by `prepare` or `from_tensors`.

    Args:
        real: True where the row holds a token of the sample, False on padding.
        placeholder: every token that stands for picture content, newlines and separators included.
        visual: the patches among them.
        last: the one row that predicts the first answer token.
        pictures: images in the order of the prompt, then videos; None if their geometry is not
            known.
        parts: positions of "question" and "answer" as far as the sample has them.
        covered: per region its tokens and their weights.
        missing: per name the error to raise when it is asked for.
        id: the sample's name, for messages.
        audio: the tokens that hear a sound.
        sounds: per sound its tokens and their seconds; None if they are not known.
    """

    real: Bool[Tensor, " pos"]
    placeholder: Int[Tensor, " placeholder"]
    visual: Int[Tensor, " visual"]
    last: Int[Tensor, " 1"]
    pictures: list[Picture] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    covered: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    missing: dict[str, CorelensError] = field(default_factory=dict)
    id: str = ""
    audio: Int[Tensor, " audio"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    sounds: list[SoundTokens] | None = None
    # hooks ask for the same names in every layer of every run
    _resolved: dict[tuple[str, bool], Tensor] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        shown = {"length": self.length, "visual": len(self.visual), "last": int(self.last)}
        shown |= {name: len(part) for name, part in self.parts.items()} | {
            "regions": len(self.covered)
        }
        return (
            f"TokenMap({self.id!r}, "
            f"{', '.join(f'{name}={value}' for name, value in shown.items())})"
        )

    # --- what there is

    @property
    def label(self) -> str:
        """What messages call its sample."""
        return f"sample {self.id!r}" if self.id else "a sample without id"

    @property
    def length(self) -> int:
        """Length of the padded row."""
        return len(self.real)

    @property
    def start(self) -> int:
        """Position of the first real token."""
        return int(self.real.int().argmax())

    @property
    def stop(self) -> int:
        """One past the position of the last real token."""
        return self.length - int(self.real.flip(0).int().argmax())

    @property
    def text(self) -> Int[Tensor, " text"]:
        """Every real token that is no placeholder: words, markers, template."""
        keep = self.real.clone()
        keep[self.placeholder] = keep[self.audio] = False
        return keep.nonzero()[:, 0]

    @property
    def template(self) -> Int[Tensor, " template"]:
        """The text around the question: every text token but the question's, the answer's and the
        last row's."""
        known = [
            self.last,
            *(self.parts[name] for name in ("question", "answer") if name in self.parts),
        ]
        return self.text[~torch.isin(self.text, torch.cat(known))]

    @property
    def all(self) -> Int[Tensor, " real"]:
        """Every real token."""
        return self.real.nonzero()[:, 0]

    @property
    def question(self) -> Int[Tensor, " question"]:
        """The tokens whose characters overlap the user's question; template, options and
        instructions excluded."""
        return self._part("question", "a question", "Sample(question=…)")

    @property
    def answer(self) -> Int[Tensor, " answer"]:
        """The gold answer's tokens, as they stand in the row (they are predicted one row
        earlier)."""
        return self._part("answer", "an answer in its row", "prepare the sample with answer=True")

    @property
    def images(self) -> list[Int[Tensor, " token"]]:
        """The visual tokens of each picture: images in the order of the prompt, then videos."""
        return [picture.positions for picture in self._pictures()]

    @property
    def regions(self) -> list[Int[Tensor, " token"]]:
        """The tokens of each of the sample's regions; empty for a sample without regions."""
        if "region" in self.missing:
            raise self.missing["region"]
        return [tokens for tokens, _ in self.covered]

    @property
    def region_weights(self) -> list[Float[Tensor, " token"]]:
        """Per region the weight of each of its tokens: 1, or the fraction of its cell that the
        region covers."""
        if "region" in self.missing:
            raise self.missing["region"]
        return [weights for _, weights in self.covered]

    @property
    def region(self) -> Int[Tensor, " region"]:
        """The union of all regions."""
        return self._union().nonzero()[:, 0]

    @property
    def region_weight(self) -> Float[Tensor, " region"]:
        """The weight of each token of the union: the sum over regions, at most 1 (exact if they do
        not overlap)."""
        union = self._union()
        return union[union > 0]

    # --- asking

    def cell(self, position: int) -> tuple[int, float, float, float, float]:
        """What a visual token covers: (image or first frame, x0, y0, x1, y1) in pixels of the
        original picture."""
        number, picture, token = self._find(position)
        first = number if picture.frames is None else int(picture.frames[token, 0])
        x0, y0, x1, y1 = picture.box[token].tolist()
        return first, x0, y0, x1, y1

    def time(self, position: int) -> tuple[int, float, float]:
        """What an audio token covers: (sound, start, end) in seconds from the sound's beginning."""
        if self.sounds is None and "sounds" in self.missing:
            raise self.missing["sounds"]
        for number, sound in enumerate(self.sounds or []):
            matches = (sound.positions == int(position)).nonzero()
            if len(matches):
                start, end = sound.seconds[int(matches[0, 0])].tolist()
                return number, start, end
        raise CorelensError(
            f"position {int(position)} of {self.label}, which is no audio token",
            f"one of the {len(self.audio)} positions in .audio",
            "ask for times of audio tokens only",
        )

    def frames(self, position: int) -> tuple[int, ...]:
        """All frames of the sample's video that a visual token covers; empty for a token of an
        image."""
        _, picture, token = self._find(position)
        if picture.frames is None:
            return ()
        return tuple(frame for frame in picture.frames[token].tolist() if frame >= 0)

    def positions(self, spec: Positions, rows: bool = False) -> Int[Tensor, " chosen"]:
        """Resolve a name, a sum of names or explicit positions to ascending positions in the padded
        row.

        Args:
            spec: "question", "last", "answer", "visual", "audio", "region", "text", "template",
                "all", "image:1", "frame:3", "thumbnail" or "tile:0" (of every picture that is shown
                in such views), or several joined by "+" (an answer that was not prepared is then
                left out); or ints, or a boolean mask [pos].
            rows: "answer" then means the rows that predict the answer's tokens, one before each.

        Errors: an unknown name, a part that the sample lacks, a position outside the row.
        """
        if not isinstance(spec, str):
            return self._explicit(spec)
        if (spec, rows) not in self._resolved:
            names = [name.strip() for name in spec.split("+")]
            named = [
                self._named(name, rows)
                for name in names
                if len(names) == 1 or name != "answer" or "answer" in self.parts
            ]
            self._resolved[spec, rows] = (
                torch.unique(torch.cat(named)) if named else torch.empty(0, dtype=torch.long)
            )
        return self._resolved[spec, rows].clone()

    def evidence_rows(self, rows: Positions) -> Int[Tensor, " row"]:
        """The rows of `positions(rows, rows=True)`, after checking that one of them at least can
        see the region."""
        resolved, region = self.positions(rows, rows=True), self.region
        if len(resolved) == 0 or resolved.max() < region.min():
            raise CorelensError(
                f"{self.label}: the {rows if isinstance(rows, str) else 'chosen'} rows "
                f"stand before the evidence: rows {resolved.tolist()[:4]}, region from position "
                f"{int(region.min())}",
                "rows that come after the picture: a token attends only to what stands before it",
                "use rows='last', or put the picture before the question",
            )
        return resolved

    def moved(self, start: int, length: int) -> "TokenMap":
        """This map of an unpadded row, in a row of `length` tokens in which it begins at
        `start`."""
        if start < 0 or start + self.length > length:
            raise CorelensError(
                f"a row of {self.length} tokens at {start} of {length}",
                "a row that fits",
                "choose another length",
            )
        real = torch.zeros(length, dtype=torch.bool)
        real[start : start + self.length] = self.real
        pictures = self.pictures
        if pictures is not None:
            pictures = [
                replace(picture, positions=picture.positions + start) for picture in pictures
            ]
        return replace(
            self,
            real=real,
            placeholder=self.placeholder + start,
            visual=self.visual + start,
            audio=self.audio + start,
            sounds=self.sounds and [sound.moved(start) for sound in self.sounds],
            last=self.last + start,
            pictures=pictures,
            parts={name: part + start for name, part in self.parts.items()},
            covered=[(tokens + start, weights) for tokens, weights in self.covered],
        )

    # --- inside

    def _part(self, name: str, expected: str, do: str) -> Tensor:
        if name in self.parts:
            return self.parts[name]
        raise self.missing.get(name) or CorelensError(
            f"{self.label} without {name}", f"a sample with {expected}", do
        )

    def _pictures(self) -> list[Picture]:
        if self.pictures is None:
            raise self.missing["images"]
        return self.pictures

    def _union(self) -> Float[Tensor, " pos"]:
        if not self.regions:
            raise no_region(self.id)
        union = torch.zeros(self.length)
        for tokens, weights in self.covered:
            union[tokens] += weights
        return union.clamp(max=1)

    def _find(self, position: int) -> tuple[int, Picture, int]:
        for number, picture in enumerate(self._pictures()):
            token = (picture.positions == int(position)).nonzero()
            if len(token):
                return number, picture, int(token[0, 0])
        raise CorelensError(
            f"position {int(position)} of {self.label}, which is no visual token",
            f"one of the {len(self.visual)} positions in .visual",
            "ask for cells of visual tokens only",
        )

    def _explicit(self, spec: int | Sequence[int] | np.ndarray | Tensor) -> Int[Tensor, " chosen"]:
        numbers = torch.as_tensor(spec).detach().cpu()
        if numbers.dtype == torch.bool and numbers.shape == self.real.shape:
            numbers = numbers.nonzero()[:, 0]
        numbers = numbers.reshape(-1)
        whole = len(numbers) == 0 or not (
            numbers.dtype.is_floating_point or numbers.dtype == torch.bool
        )
        numbers = torch.unique(numbers.long())
        if not whole or (len(numbers) and (numbers[0] < 0 or numbers[-1] >= self.length)):
            raise CorelensError(
                f"positions {spec!r} in a row of {self.length} tokens",
                f"whole numbers from 0 to {self.length - 1}, or a boolean mask of the row's length",
                "count positions in the padded row; token maps give them",
            )
        return numbers

    def _named(self, name: str, rows: bool) -> Int[Tensor, " chosen"]:
        if name == "answer" and rows:
            return self.answer - 1
        check_name(name)
        if name in WORDS:
            return getattr(self, name)
        kind, _, number = name.partition(":")
        if kind in ("image", "frame"):
            return self._image(int(number)) if kind == "image" else self._frame(int(number))
        return self._view(name, int(number) if number else THUMBNAIL)

    def _image(self, number: int) -> Int[Tensor, " token"]:
        if number < len(self.images):
            return self.images[number]
        raise CorelensError(
            f"image:{number} of {self.label}",
            f"image:0 to image:{len(self.images) - 1}",
            "count from 0",
        )

    def _view(self, name: str, number: int) -> Int[Tensor, " token"]:
        tokens: list[Tensor] = []
        views: set[int] = set()
        for picture in self._pictures():
            if picture.views is not None:
                tokens.append(picture.positions[picture.views == number])
                views |= set(picture.views.tolist())
        if any(map(len, tokens)):
            return torch.cat(tokens)
        names = ["thumbnail" if view == THUMBNAIL else f"tile:{view}" for view in sorted(views)]
        raise CorelensError(
            f"{name!r} of {self.label}",
            f"a view of its pictures: {', '.join(names)}"
            if names
            else "a model that shows a picture in several views",
            "use one of these"
            if names
            else "this one shows each picture once: use 'image:0' or 'visual'",
        )

    def _frame(self, number: int) -> Int[Tensor, " token"]:
        videos = [picture for picture in self._pictures() if picture.frames is not None]
        tokens = [
            video.positions[(video.frames == number).any(1)]
            for video in videos
            if video.frames is not None
        ]
        if any(map(len, tokens)):
            return torch.cat(tokens)
        count = max(
            (int(video.frames.max()) + 1 for video in videos if video.frames is not None), default=0
        )
        raise CorelensError(
            f"frame:{number} of {self.label}",
            f"a video's frame below {count}",
            "count from 0",
        )


def check_name(name: str) -> None:
    """Raise for a word that is no position's name, with the nearest names."""
    kind, _, number = name.partition(":")
    if name in (*WORDS, "thumbnail") or (kind in ("image", "frame", "tile") and number.isdecimal()):
        return
    near = get_close_matches(name, NAMES, n=2)
    raise CorelensError(
        f"positions {name!r}",
        f"one of {', '.join(map(repr, NAMES))}, or several joined by '+'",
        f"did you mean {' or '.join(map(repr, near))}?" if near else "use a known name",
    )
