"""`model.verify(inputs)`: the identities of a hooked model, measured on this model, environment and
device."""

from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import attention_name, attention_off
from corelens.hooks.exchange import original
from corelens.hooks.running import turn
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.identities import IDENTITIES, Identity, Subject
from corelens.model.probing import tower_modules
from corelens.model.self_check import OTHER_KERNEL, distance, evaluating

PICTURE = 224  # pixels a side of the picture that is drawn where no inputs are given
PAINTED = 3  # cells: the first, one in the middle, the last
QUESTIONS = (
    "What is in the picture?",
    "Which colour does the largest of all of these squares have?",
)


@dataclass(frozen=True)
class Verification:
    """What `model.verify` measured: a row an identity, as text with print(), as a table in a
    notebook."""

    model: str
    rows: tuple[Identity, ...]

    @property
    def ok(self) -> bool:
        """Whether every identity that could be measured holds."""
        return all(row.passed is not False for row in self.rows)

    @property
    def refused(self) -> tuple[str, ...]:
        """The hook points whose identity does not hold: their names are refused from now on."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.failed))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it; an infinite error (a shape that differs) is the text "inf"."""
        rows = [
            {
                "identity": row.name, "error": _number(row.error), "allowed": row.allowed,
                "passed": row.passed,
                "note": row.note, "refused": list(row.failed),
            }
            for row in self.rows
        ]  # fmt: skip
        return {"model": self.model, "ok": self.ok, "rows": rows, "refused": list(self.refused)}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        report = [f"{_verdict(row):8} {row.name:<{width}}  {_measured(row)}" for row in self.rows]
        if self.refused:
            report.append(f"refused from now on: {_shortened(self.refused)}")
        return "\n".join([self.model, *report])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = [
            f"<tr><td>{_verdict(row)}</td><td>{escape(row.name)}</td><td>{escape(_measured(row))}</td></tr>"
            for row in self.rows
        ]
        refused = (
            f"<p>refused from now on: {escape(_shortened(self.refused))}</p>"
            if self.refused
            else ""
        )
        head = "<tr><th></th><th>identity</th><th>measured</th></tr>"
        return f"<p>{escape(self.model)}</p><table>{head}{''.join(cells)}</table>{refused}"


def _verdict(row: Identity) -> str:
    return {True: "pass", False: "FAIL", None: "not run"}[row.passed]


def _measured(row: Identity) -> str:
    if row.error is None or row.allowed is None:
        return row.note
    return f"error {row.error:.2g} (allowed {row.allowed:.2g}) {row.note}".rstrip()


def _number(error: float | None) -> float | str | None:
    return "inf" if error == float("inf") else error


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def verify(model: Any, inputs: Any = None) -> Verification:
    """Measure every identity, and refuse the hook points that one of them does not hold for.

    Args:
        model: a HookedMLLM; hooks that hang on it are not run.
        inputs: what `prepare` made, or the Hugging Face model's tensors by name; by default a
            picture is drawn and asked about, for which the model needs its processor.
    """
    twin = type(model)(model.hf, model.processor, check=False)  # the same model, points of its own
    twin.layout = model.layout
    if inputs is None and model.processor is None:
        raise CorelensError(
            "verify() of a model without a processor", "inputs to run it on",
            "give model.inputs(**tensors), or wrap the model with its processor",
        )  # fmt: skip
    with turn(model.hf), torch.no_grad(), evaluating(model.hf):
        batch = twin.prepare(_samples()[0]) if inputs is None else inputs
        batch = batch if isinstance(batch, Inputs) else twin.inputs(**batch)
        subject = Subject(twin, batch)
        # (after a plain forward: transformers marks its modules at their first)
        untouched = _state(model.hf)
        rows = [measure(subject) for measure in IDENTITIES]
        rows += [_batches(twin), _painted(twin), _gone(subject, untouched)]
    result = Verification(f"{type(model.hf).__name__}: {model!r}", tuple(rows))
    for row in rows:
        why = f"“{row.name}” does not hold for it on this model and machine (model.verify)"
        model.refuse(dict.fromkeys(row.failed, why))
    return result


# --- what needs a processor


def _samples() -> list[Sample]:
    """Two questions of different length about one picture, which is drawn here: no model warns that
    it is foreign."""
    return [
        Sample(images=[_picture()], question=question, meta={"world": "noise"})
        for question in QUESTIONS
    ]


def _picture() -> Any:
    """Noise: no two cells of it are alike."""
    from PIL import Image

    return Image.fromarray(
        np.random.default_rng(0).integers(40, 200, (PICTURE, PICTURE, 3), dtype=np.uint8)
    )


def _batches(model: Any) -> Identity:
    """A sample's last row has the same logits in a padded batch as by itself."""
    name = "a batch = its samples one by one"
    if model.processor is None:
        return Identity(name, None, None, "needs the processor")
    samples = _samples()
    together = model(model.prepare(samples))[:, -1].float()
    alone = torch.cat([model(model.prepare(sample))[:, -1].float() for sample in samples])
    single = next(model.hf.parameters()).dtype in (torch.float32, torch.float64)
    return Identity(
        name, distance(together, alone), OTHER_KERNEL if single else 0.1, "of the logits' spread"
    )


def _painted(model: Any) -> Identity:
    """Painting the cell of a visual token in the picture moves that token's embedding more than any
    other one's.

    The tower's attention is left out meanwhile (z = 0), so that what is painted stays where it is.
    """
    name = "a token's cell = where paint moves it"
    if model.processor is None:
        return Identity(name, None, None, "needs the processor")
    sample = _samples()[0]
    try:
        token_map = model.prepare(sample).token_maps[0]
        cells = {position: token_map.cell(position)[1:] for position in token_map.visual.tolist()}
    except CorelensError as error:
        return Identity(name, None, None, str(error).splitlines()[0])
    large = [position for position, (x0, y0, x1, y1) in cells.items() if min(x1 - x0, y1 - y0) >= 3]
    if not large:
        return Identity(name, None, None, "no cell of 3 pixels or more")
    painted = [large[number] for number in np.linspace(0, len(large) - 1, PAINTED).astype(int)]
    with attention_off(tower_modules(model.hf, model.layout.decoder(model.hf))):
        clean = _embeddings(model, sample)
        missed = 0
        for position in painted:
            paint = _inside(cells[position])
            moved = (
                (_embeddings(model, replace(sample, images=[_with_paint(paint)])) - clean)
                .abs()
                .amax(-1)
            )
            others = [
                p for p, x in cells.items() if _alike(x, cells[position]) and not _holds(x, paint)
            ]
            most = float(moved[others].max()) if others else 0.0
            missed += int(float(moved[position]) <= most)
    return Identity(name, float(missed), 0.0, f"of {len(painted)} cells missed")


def _embeddings(model: Any, sample: Sample) -> Tensor:
    """What the first layer gets, [pos, d_model]."""
    inputs, entering = model.prepare(sample), []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    first = model.layout.decoder(model.hf).layers[0]
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.hf(**inputs.tensors, use_cache=False)
    finally:
        handle.remove()
    return entering[0][0].float()


def _inside(cell: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """Whole pixels in the middle of a cell."""
    x0, y0, x1, y1 = cell
    left, top = int(x0 + (x1 - x0) * 0.35), int(y0 + (y1 - y0) * 0.35)
    return (
        left,
        top,
        max(left + 1, int(x0 + (x1 - x0) * 0.65)),
        max(top + 1, int(y0 + (y1 - y0) * 0.65)),
    )


def _with_paint(block: tuple[int, int, int, int]) -> Any:
    from PIL import Image

    x0, y0, x1, y1 = block
    pixels = np.array(_picture())
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def _alike(cell: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two cells are of one size, as those of one view are."""
    sizes = [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (cell, other)]
    return all(abs(a - b) < 1e-6 for a, b in zip(*sizes, strict=True))


def _holds(cell: tuple[float, float, float, float], block: tuple[int, int, int, int]) -> bool:
    """Whether a cell, perhaps another view's, shows all that was painted."""
    return (
        cell[0] <= block[0] and cell[1] <= block[1] and cell[2] >= block[2] and cell[3] >= block[3]
    )


# --- afterwards


def _state(hf: nn.Module) -> tuple[list[Any], Any]:
    """All that a run could leave behind: hooks, names of attention functions, methods, and the
    function itself."""
    modules = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), sorted(vars(m)))
        for m in hf.modules()
    ]
    names = [attention_name(module.config) for module in hf.modules() if hasattr(module, "config")]
    return [modules, names], original()


def _gone(subject: Subject, untouched: tuple[list[Any], Any]) -> Identity:
    """Afterwards no hook is left, every name and function is what it was, and the logits are the
    same."""
    left = _state(subject.model.hf)
    error = int(left[0] != untouched[0]) + int(left[1] is not untouched[1])
    error += int(not torch.equal(subject.forward().nan_to_num(), subject.plain.nan_to_num()))
    return Identity(
        "afterwards nothing is left", float(error), 0.0, "things that are not as before"
    )
