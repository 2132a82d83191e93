"""Training batches of the demo models: pure functions of a plan, so that another process can draw them ahead."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from corelens.data.synthetic.refer import COLOURS, KINDS, QUESTION, Scene, draw_scene, draw_size, stream
from corelens.data.synthetic.video import FPS
from corelens.data.synthetic.video import ask as ask_video
from corelens.data.synthetic.video import draw_scene as video_scene
from corelens.data.synthetic.video import paint as paint_video
from corelens.demo.build import PRESETS, build_config, build_processor
from corelens.layouts import layout_for
from corelens.tokens import Cells

CAPTION = "List every object."
LABELS = {"colour": len(COLOURS), "kind": len(KINDS), "digit": 10}  # one label more means "none"
IGNORED = -100
GRID = 16  # pixels: where the centres of a video's shapes lie, as those of `refer` do
VIDEO = 1_000_003  # in the entropy of a video's random stream
_TOKEN = 32  # pixels a side of a video's token
_REACH = 23 / 32  # of a token's side: from an object's centre to a token's centre, to the corner of four tokens at most


@dataclass(frozen=True)
class Plan:
    """What one training batch shall be.

    Args:
        model: the preset's name (which processor).
        form: "dense" (labels on visual tokens), "caption" or "questions".
        seed, step: name the random stream.
        batch: scenes in the batch; all share one size.
        objects: shapes a scene (as many as fit, for "dense").
        sides: smallest and largest side in pixels, in steps of 32.
        jitter: of centres, in pixels.
        colours: how many colours a scene may use.
        questions: at most so many a scene.
        frames: of a scene of `video`, an even number; 0 for a picture of `refer`.
    """

    model: str
    form: str
    seed: int
    step: int
    batch: int
    objects: int
    sides: tuple[int, int]
    jitter: float = 0.0
    colours: int = len(COLOURS)
    questions: int = 4
    frames: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        return cls(**{**data, "sides": tuple(data["sides"])})


def draw_batch(plan: Plan) -> dict[str, np.ndarray]:
    """The batch of a plan.

    Returns:
        images [batch, height, width, 3] (a video's: [batch, frames, height, width, 3]) uint8 and, for "dense", labels
        [batch, visual tokens, 3] (colour, kind, digit); else input_ids and labels [batch, pos], and answers [batch,
        pos]: True where a digit is to be predicted.
    """
    rng = stream("train", plan.seed, plan.step)
    width, height = draw_size(rng, plan.sides)
    if plan.frames:
        return _video_batch(plan, rng, width, height)
    pads, cells = picture_tokens(plan.model, width, height)
    objects = plan.objects
    if plan.form == "dense":
        objects = max(1, min(objects, width * height // 8000))
    scenes = [
        draw_scene(
            stream("train", plan.seed, plan.step, 1 + row), width, height, objects, plan.jitter, colours=plan.colours
        )
        for row in range(plan.batch)
    ]
    batch = {"images": np.stack([np.asarray(scene.image) for scene in scenes])}
    if plan.form == "dense":
        return batch | {"labels": np.stack([dense_labels(scene, cells) for scene in scenes])}
    if plan.form == "caption":
        shuffled = PRESETS[plan.model].get("captions") == "shuffled"
        chats = [caption_chat(scene, rng if shuffled else None) for scene in scenes]
    else:
        chats = [question_chat(scene, rng, plan.questions) for scene in scenes]
    return batch | tokenize(_processor(plan.model), chats, pads)


def _video_batch(plan: Plan, rng: np.random.Generator, width: int, height: int) -> dict[str, np.ndarray]:
    """The batch of a plan of `video`, on `refer`'s grid."""
    clips, chats = [], []
    for row in range(plan.batch):
        own = stream("train", VIDEO, plan.seed, plan.step, row)
        scene, _ = video_scene(own, width, height, plan.frames, plan.objects, grid=GRID)
        clips.append(np.stack([np.asarray(frame) for frame in paint_video(scene)]))
        figures = [actor.at(0) for actor in scene.actors]
        marks = [actor.figure.symbol for actor in scene.actors]
        if plan.form == "caption":
            order = sorted(range(len(figures)), key=lambda i: (figures[i].x, figures[i].y))
            words = ", ".join(f"{figures[i].colour} {figures[i].kind} {marks[i]}" for i in order) + "."
            chats.append([_user(CAPTION, "video"), {"role": "assistant", "content": words}])
            continue
        chat: list[dict[str, Any]] = []
        for i in rng.permutation(len(figures))[: plan.questions]:
            query = ask_video(scene, int(i))
            chat += [_user(query.question, "" if chat else "video"), {"role": "assistant", "content": query.answer}]
        chats.append(chat)
    processor = _processor(plan.model)
    return {"images": np.stack(clips)} | tokenize(processor, chats, video_pads(plan.frames, width, height))


@lru_cache(maxsize=64)
def picture_tokens(model: str, width: int, height: int) -> tuple[dict[str, str], Cells]:
    """What a preset's processor puts for a picture's placeholder, and the cells of these tokens; those of a thumbnail
    count as no patch, for dense labels speak of the tiles."""
    processor = _processor(model)
    placeholder, config = processor.image_token, build_config(model, processor)
    blank = Image.new("RGB", (width, height))
    features = processor(text=[placeholder], images=[blank], return_tensors="pt")
    cells = layout_for(config).image_cells(processor, config, dict(features), 0, blank.size)
    if (thumbnail := PRESETS[model].get("thumbnail")) is not None:
        cells.visual[thumbnail] = False
    return {placeholder: processor.tokenizer.decode(features["input_ids"][0])}, cells


def video_pads(frames: int, width: int, height: int) -> dict[str, str]:
    """What the processor puts for a video's placeholder: each pair of frames with its time."""
    each = "<|video_pad|>" * (width * height // _TOKEN**2)
    times = [(pair * 2 + 0.5) / FPS for pair in range(frames // 2)]
    pairs = (f"<{time:.1f} seconds><|vision_start|>{each}<|vision_end|>" for time in times)
    return {"<|video_pad|>": "".join(pairs)}


def dense_labels(scene: Scene, cells: Cells) -> np.ndarray:
    """[tokens, 3]: colour, kind and digit of the object centred within reach of a token, else "none"; ignored where a
    token is no patch."""
    boxes = cells.box.numpy()
    centres, reach = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2, _REACH * (boxes[:, 2] - boxes[:, 0])
    objects = np.array([[shape.x, shape.y] for shape in scene.shapes])
    distance = np.hypot(*np.moveaxis(centres - objects, -1, 0))
    nearest, near = distance.argmin(1), distance.min(1) <= reach
    names = np.array([[list(COLOURS).index(s.colour), KINDS.index(s.kind), s.digit] for s in scene.shapes])
    labels = np.where(near[:, None], names[nearest], np.array(list(LABELS.values())))
    return np.where(cells.visual.numpy()[:, None], labels, IGNORED)


def caption_chat(scene: Scene, rng: np.random.Generator | None = None) -> list[dict[str, Any]]:
    """A chat in which the assistant lists the scene's objects from left to right or, with a random stream, in
    any order: then what it has said so far names what is to be found next, as questions do.
    """
    shapes = sorted(scene.shapes, key=lambda s: (s.x, s.y))
    if rng is not None:
        rng.shuffle(shapes)
    caption = ", ".join(f"{s.colour} {s.kind} {s.digit}" for s in shapes) + "."
    return [_user(CAPTION, "image"), {"role": "assistant", "content": caption}]


def question_chat(scene: Scene, rng: np.random.Generator, most: int) -> list[dict[str, Any]]:
    """A chat of up to `most` questions on different objects of the scene; its first turn is `refer`'s prompt."""
    chat: list[dict[str, Any]] = []
    for i in rng.permutation(len(scene.shapes))[:most]:
        shape = scene.shapes[i]
        chat.append(_user(QUESTION.format(colour=shape.colour, kind=shape.kind), "" if chat else "image"))
        chat.append({"role": "assistant", "content": str(shape.digit)})
    return chat


def _user(text: str, before: str) -> dict[str, Any]:
    """The user's turn; `before` the words an "image", a "video" or nothing."""
    words = {"type": "text", "text": text}
    return {"role": "user", "content": [{"type": before}, words] if before else [words]}


def tokenize(processor: ProcessorMixin, chats: list[list[dict]], pads: dict[str, str]) -> dict[str, np.ndarray]:
    """Right-padded ids of chats, each with one picture or video that takes the place of its placeholder as `pads` says;
    labels on what the assistant says."""
    tokenizer = processor.tokenizer
    texts = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
    for placeholder, tokens in pads.items():
        texts = [text.replace(placeholder, tokens) for text in texts]
    rows = tokenizer(texts)["input_ids"]
    ids = np.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = np.full_like(ids, IGNORED)
    opening = tokenizer("<|im_start|>assistant\n")["input_ids"]
    end, digits = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids([str(d) for d in range(10)])
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        start = 0
        while start < len(tokens):
            if tokens[start : start + len(opening)] != opening:
                start += 1
                continue
            first = start + len(opening)
            start = tokens.index(end, first) + 1
            labels[row, first:start] = tokens[first:start]
    return {"input_ids": ids, "labels": labels, "answers": np.isin(labels, digits)}


@lru_cache(maxsize=4)
def _processor(name: str) -> Any:
    return build_processor(name)
