"""The explorer live in Jupyter: another question, a box, an intervention on the pinned heads, and
the answer."""

from dataclasses import replace
from typing import Any

import anywidget
import traitlets

from corelens.errors import CorelensError
from corelens.explorer.assets import script, style
from corelens.explorer.recording import answered, record
from corelens.heads.head_set import HeadSet
from corelens.hooks.points import Hook
from corelens.interventions.ablation import ablate
from corelens.interventions.knockouts import edge_bias, knockout
from corelens.tokens.regions import Box, Tube

_ESM = """
export default {
  render({ model, el }) {
    const root = document.createElement("div");
    el.append(root);
    let view = null;
    const draw = () => {
      const send = (message) => model.send(message);
      const live = { view, settings: model.get("settings"), send, failed: () => {} };
      view = corelensExplorer(root, model.get("recording"), live);
      root.live = live;
    };
    model.on("change:recording", draw);
    model.on("msg:custom", (message) => root.live.failed(message.error));
    draw();
  },
};
"""


class ExplorerWidget(anywidget.AnyWidget):
    """The page's script on a running model. `value` holds what was chosen in it."""

    _esm = script() + _ESM
    _css = style()
    recording = traitlets.Dict().tag(sync=True)
    settings = traitlets.Dict({"kind": "none", "value": 4.0}).tag(sync=True)

    def __init__(self, explorer: Any):
        self.explorer = explorer
        self.heads = explorer.pinned
        self.box: Box | Tube | None = None
        self.question = explorer.sample.question
        super().__init__(recording=explorer.recording)
        self.on_msg(lambda _, message, buffers: self.receive(message))

    def receive(self, message: dict[str, Any]) -> None:
        """Take what the browser sends: pinned heads, a box, or the wish to run; a mistake is shown,
        not raised."""
        try:
            if "pins" in message:
                self.heads = HeadSet([tuple(head) for head in message["pins"]])
            if "box" in message:
                self.box = self._box(message["box"])
            if "run" in message:
                self.run(**message["run"])
        except (CorelensError, RuntimeError) as error:
            self.send({"error": str(error)})

    def run(self, question: str, kind: str, value: float) -> None:
        """Answer `question` under an intervention on the pinned heads, and show the new run beside
        the clean one."""
        explorer = self.explorer
        self.question = question
        regions = explorer.sample.regions if self.box is None else [self.box]
        sample = replace(explorer.sample, question=question, answer=None, regions=regions)
        settings = {"kind": kind, "value": float(value)}
        recording = record(
            explorer.model,
            sample,
            _hooks(self.heads, settings),
            first=list(self.heads),
            **explorer.settings,
        )
        if kind != "none":
            _, clean = answered(explorer.model, sample, [], explorer.settings["max_new_tokens"])
            recording["clean"] = clean.as_dict()
        self.settings = settings
        self.recording = recording

    @property
    def value(self) -> dict[str, Any]:
        """The pinned `heads`, the `box` that was drawn (or None), the intervention as `hooks`, and
        its `code`."""
        return {
            "heads": self.heads, "box": self.box, "question": self.question,
            "hooks": _hooks(self.heads, self.settings), "code": self._code(),
        }  # fmt: skip

    def _box(self, box: dict[str, Any]) -> Box | Tube:
        x0, y0, x1, y1 = (round(float(box[side]), 1) for side in ("x0", "y0", "x1", "y1"))
        if box["frame"] is None:
            return Box(x0, y0, x1, y1, image=int(box["image"]))
        return Tube({int(box["frame"]): Box(x0, y0, x1, y1)})

    def _code(self) -> str:
        code = [f"heads = cl.HeadSet({[tuple(head) for head in self.heads]})"]
        if self.box is not None:
            code.append(f"sample.regions = [{_written(self.box)}]")
        calls = {
            "none": "[]", "zero": 'cl.ablate(heads, "zero")', "uniform": 'cl.ablate(heads, '
                '"uniform")',
            "knockout": 'cl.knockout(heads, columns="region")',
            "bias": f'cl.edge_bias(heads, columns="region", value={self.settings["value"]})',
        }  # fmt: skip
        return "\n".join([*code, f"hooks = {calls[str(self.settings['kind'])]}"])


def _written(region: Box | Tube) -> str:
    if isinstance(region, Tube):
        boxes = ", ".join(f"{frame}: cl.{box!r}" for frame, box in region.boxes.items())
        return f"cl.Tube({{{boxes}}})"
    return f"cl.{region!r}"


def _hooks(heads: HeadSet, settings: dict[str, Any]) -> list[Hook]:
    """The hooks of an intervention by its name in the page; none where no head is pinned."""
    kind = settings["kind"]
    if kind == "none" or not len(heads):
        return []
    if kind == "zero":
        return ablate(heads, "zero")
    if kind == "uniform":
        return ablate(heads, "uniform")
    if kind == "knockout":
        return knockout(heads, columns="region")
    if kind == "bias":
        return edge_bias(heads, columns="region", value=settings["value"])
    raise CorelensError(
        f"the intervention {kind!r}", "none, zero, uniform, knockout or bias", "choose one of these"
    )
