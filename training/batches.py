"""Training batches of the demo models: pure functions of a plan, so that another process can draw
them ahead."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from corelens.data.synthetic.doc import ask as ask_page
from corelens.data.synthetic.doc import draw_document
from corelens.data.synthetic.drawing import DIGITS, LETTERS, Query
from corelens.data.synthetic.pages import paint as paint_page
from corelens.data.synthetic.refer import COLOURS, QUESTION, Scene, draw_scene, draw_size, stream
from corelens.data.synthetic.refer_hard import FORMS, questions, size_of
from corelens.data.synthetic.refer_hard import draw_scene as hard_scene
from corelens.data.synthetic.refer_hard import paint as paint_hard
from corelens.data.synthetic.video import FPS
from corelens.data.synthetic.video import ask as ask_video
from corelens.data.synthetic.video import draw_scene as video_scene
from corelens.data.synthetic.video import paint as paint_video
from corelens.layouts import layout_for
from corelens.tokens.cells import Cells
from training.asked import ask_compare, ask_hops, first_step
from training.build import PRESETS, build_config, build_processor
from training.dense import IGNORED, clip_labels, figure_labels, page_labels, shape_labels, sheet

CAPTION = "List every object."
GRID = 16  # pixels: where the centres of a video's shapes lie, as those of `refer` do
# in the entropy of their random streams
HARD, DOC, VIDEO, SHEET, COMPARE, HOP = (1_000_001 + i for i in range(6))
_TOKEN = 32  # pixels a side of a video's token


@dataclass(frozen=True)
class Plan:
    """What one training batch shall be.

    Args:
        model: the preset's name (which processor).
        form: "dense" (labels on visual tokens), "caption" or "questions".
        seed, step: name the random stream.
        batch: scenes in the batch; all share one size.
        objects: shapes a scene (as many as fit, for "dense"); of `doc` lines a page.
        sides: smallest and largest side in pixels, in steps of 32.
        jitter: of centres, in pixels.
        colours: how many colours a scene may use.
        questions: at most so many a scene.
        world: "refer", "refer-hard", "doc", "video", "compare" or "hop" (questions alone), or
            "sheet" (of symbols, for "dense" alone).
        frames: of a scene of `video`, an even number.
        pages: of a document of `doc`.
        forms: of question, of `refer-hard`, `compare` or `hop`, and those of `asked.py`.
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
    world: str = "refer"
    frames: int = 0
    pages: int = 1
    forms: tuple[str, ...] = FORMS

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Plan":
        return cls(
            **{**data, "sides": tuple(data["sides"]), "forms": tuple(data.get("forms", FORMS))}
        )


def draw_batch(plan: Plan) -> dict[str, np.ndarray]:
    """The batch of a plan.

    Returns:
        images [batch, height, width, 3] (a video's: [batch, frames, height, width, 3]; a document's
        pages follow one
        another: [batch · pages, height, width, 3]) uint8 and, for "dense", labels [batch, visual
        tokens, labels] as in `LABELS`; else input_ids and labels [batch, pos], and answers [batch,
        pos]: True where a symbol is to be predicted.
    """
    rng = stream("train", plan.seed, plan.step)
    width, height = draw_size(rng, plan.sides)
    draw = {
        "refer": _pictures,
        "refer-hard": _hard,
        "video": _clips,
        "doc": _documents,
        "compare": _asked,
        "hop": _asked,
        "sheet": _sheets,
    }[plan.world]
    return draw(plan, rng, width, height)


def _pictures(
    plan: Plan, rng: np.random.Generator, width: int, height: int
) -> dict[str, np.ndarray]:
    """Of `refer`."""
    pads, cells = picture_tokens(plan.model, width, height)
    objects = plan.objects
    if plan.form == "dense":
        objects = max(1, min(objects, width * height // 8000))
    scenes = [
        draw_scene(
            stream("train", plan.seed, plan.step, 1 + row),
            width,
            height,
            objects,
            plan.jitter,
            colours=plan.colours,
        )
        for row in range(plan.batch)
    ]
    batch = {"images": np.stack([np.asarray(scene.image) for scene in scenes])}
    if plan.form == "dense":
        return batch | {"labels": np.stack([shape_labels(scene.shapes, cells) for scene in scenes])}
    if plan.form == "caption":
        shuffled = PRESETS[plan.model].get("captions") == "shuffled"
        chats = [caption_chat(scene, rng if shuffled else None) for scene in scenes]
    else:
        chats = [question_chat(scene, rng, plan.questions) for scene in scenes]
    return batch | tokenize(_processor(plan.model), chats, pads)


def _hard(plan: Plan, rng: np.random.Generator, width: int, height: int) -> dict[str, np.ndarray]:
    """Of `refer-hard`: questions of each form as often."""
    pads, cells = picture_tokens(plan.model, width, height)
    pictures, chats, labels = [], [], []
    for row in range(plan.batch):
        own = stream("train", HARD, plan.seed, plan.step, row)
        word = str(own.choice(["symbol", "symbol", "digit", "letter"]))
        scene, _ = hard_scene(
            own, width, height, plan.objects, word, plan.forms[row % len(plan.forms)]
        )
        pictures.append(np.asarray(paint_hard(scene)))
        if plan.form == "dense":
            labels.append(figure_labels(scene.figures, cells))
        elif plan.form == "caption":
            names = [f"{size_of(f)} {f.colour} {f.kind} {f.symbol}" for f in scene.figures]
            words = ", ".join(names[i] for i in own.permutation(len(names))) + "."
            chats.append([_user(CAPTION, ["image"]), {"role": "assistant", "content": words}])
        else:
            scene_questions = questions(scene)
            kinds = [
                [query for query in scene_questions if query.form == form] for form in plan.forms
            ]
            kinds = [own.permutation(np.array(part, object)).tolist() for part in kinds if part]
            asked = [part[i] for i in range(plan.questions) for part in kinds if i < len(part)][
                : plan.questions
            ]
            chats.append(_chat([asked[i] for i in own.permutation(len(asked))]))
    return _batch(plan, pictures, chats, labels, pads)


def _asked(plan: Plan, rng: np.random.Generator, width: int, height: int) -> dict[str, np.ndarray]:
    """Of `compare` or `hop`."""
    world, ask = (COMPARE, ask_compare) if plan.world == "compare" else (HOP, ask_hops)
    pads, _ = picture_tokens(plan.model, width, height)
    pictures, chats, steps = [], [], []
    for row in range(plan.batch):
        own = stream("train", world, plan.seed, plan.step, row)
        form = plan.forms[row % len(plan.forms)]
        scene, queries = ask(form, own, width, height, plan.objects)
        queries = queries[: plan.questions]
        pictures.append(np.asarray(paint_hard(scene)))
        chats.append(_chat(queries))
        steps.append([first_step(scene, query) for query in queries])
    batch = _batch(plan, pictures, chats, [], pads)
    # An answer may be a word: its first token is asked for.
    spoken = batch["labels"] != IGNORED
    batch["answers"] = spoken & ~np.pad(spoken[:, :-1], ((0, 0), (1, 0)))
    traits = _found(_processor(plan.model).tokenizer, batch["input_ids"], steps)
    return batch | ({"found": traits} if (traits != IGNORED).any() else {})


def _found(
    tokenizer: Any, ids: np.ndarray, steps: list[list[tuple[str, str] | None]]
) -> np.ndarray:
    """[batch, pos]: at the first word of a question that names the shape of its first step, the
    token that this step has to find; elsewhere IGNORED. `steps`: of each chat's questions in turn,
    as `first_step` gives them."""
    traits = np.full_like(ids, IGNORED)
    start, user = tokenizer.convert_tokens_to_ids(["<|im_start|>", "user"])
    for row, chat in enumerate(steps):
        begins = np.flatnonzero((ids[row, :-1] == start) & (ids[row, 1:] == user))
        for begin, step in zip(begins, chat, strict=True):
            if step is not None:
                word, trait = (tokenizer(text)["input_ids"][0] for text in (f" {step[0]}", step[1]))
                traits[row, begin + int(np.argmax(ids[row, begin:] == word))] = trait
    return traits


def _clips(plan: Plan, rng: np.random.Generator, width: int, height: int) -> dict[str, np.ndarray]:
    """Of `video`; without jitter on `refer`'s grid."""
    clips, chats, labels = [], [], []
    _, cells = picture_tokens(plan.model, width, height)
    objects = (
        plan.objects
        if plan.form != "dense"
        else max(1, min(plan.objects, width * height // 13_000))
    )
    grid, span = (
        (1 if plan.jitter else GRID),
        ((1, plan.frames - 1) if plan.form == "dense" else None),
    )
    for row in range(plan.batch):
        own = stream("train", VIDEO, plan.seed, plan.step, row)
        scene, _ = video_scene(own, width, height, plan.frames, objects, span=span, grid=grid)
        clips.append(np.stack([np.asarray(frame) for frame in paint_video(scene)]))
        if plan.form == "dense":
            labels.append(clip_labels(scene, cells))
            continue
        figures = [actor.at(0) for actor in scene.actors]
        marks = [actor.figure.symbol for actor in scene.actors]
        if plan.form == "caption":
            order = sorted(range(len(figures)), key=lambda i: (figures[i].x, figures[i].y))
            words = (
                ", ".join(f"{figures[i].colour} {figures[i].kind} {marks[i]}" for i in order) + "."
            )
            chats.append([_user(CAPTION, ["video"]), {"role": "assistant", "content": words}])
            continue
        asked = rng.permutation(len(figures))[: plan.questions]
        chats.append(_chat([ask_video(scene, int(i)) for i in asked], ["video"]))
    if plan.form == "dense":
        return {"images": np.stack(clips), "labels": np.stack(labels)}
    processor = _processor(plan.model)
    return {"images": np.stack(clips)} | tokenize(
        processor, chats, video_pads(plan.frames, width, height)
    )


def _documents(
    plan: Plan, rng: np.random.Generator, width: int, height: int
) -> dict[str, np.ndarray]:
    """Of `doc`."""
    pads, cells = picture_tokens(plan.model, width, height)
    pictures, chats, labels = [], [], []
    for row in range(plan.batch):
        own = stream("train", DOC, plan.seed, plan.step, row)
        document, _ = draw_document(own, width, height, plan.pages, plan.objects, named=1.0)
        pictures += [np.asarray(paint_page(page)) for page in document]
        if plan.form == "dense":
            labels += [page_labels(page, cells) for page in document]
        elif plan.form == "caption":
            # In any order: from top to bottom it would find values by their place, and never by
            # their key.
            lists = [
                ", ".join(
                    f"{page.lines[i].key} {page.lines[i].value}"
                    for i in rng.permutation(len(page.lines))
                )
                for page in document
            ]
            words = " ".join(f"page {i + 1}: {words}." for i, words in enumerate(lists))
            chats.append(
                [_user(CAPTION, ["image"] * plan.pages), {"role": "assistant", "content": words}]
            )
        else:
            places = [(i, k) for i, page in enumerate(document) for k in range(len(page.lines))]
            # First the keys of several pages, whose questions name the page.
            keys = [document[i].lines[k].key for i, k in places]
            order = sorted(rng.permutation(len(places)), key=lambda i: keys.count(keys[i]) == 1)
            asked = [places[i] for i in order[: plan.questions]]
            chats.append(
                _chat([ask_page(document, *place) for place in asked], ["image"] * plan.pages)
            )
    return _batch(plan, pictures, chats, labels, pads)


def _batch(
    plan: Plan, pictures: list, chats: list, labels: list, pads: dict[str, str]
) -> dict[str, np.ndarray]:
    """Pictures with the labels of their tokens, or with what is said of them."""
    targets = (
        {"labels": np.stack(labels)}
        if plan.form == "dense"
        else tokenize(_processor(plan.model), chats, pads)
    )
    return {"images": np.stack(pictures)} | targets


def _sheets(plan: Plan, rng: np.random.Generator, width: int, height: int) -> dict[str, np.ndarray]:
    """Of symbols alone, with dense labels."""
    _, cells = picture_tokens(plan.model, width, height)
    own = [stream("train", SHEET, plan.seed, plan.step, row) for row in range(plan.batch)]
    drawn = [sheet(rng, width, height, plan.jitter, cells) for rng in own]
    return {
        "images": np.stack([np.asarray(image) for image, _ in drawn]),
        "labels": np.stack([x for _, x in drawn]),
    }


@lru_cache(maxsize=64)
def picture_tokens(model: str, width: int, height: int) -> tuple[dict[str, str], Cells]:
    """What a preset's processor puts for a picture's placeholder, and the cells of these tokens;
    those of a thumbnail count as no patch where the preset says so."""
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
    pad = "<|video_pad|>" * (width * height // _TOKEN**2)
    times = [(pair * 2 + 0.5) / FPS for pair in range(frames // 2)]
    pairs = (f"<{time:.1f} seconds><|vision_start|>{pad}<|vision_end|>" for time in times)
    return {"<|video_pad|>": "".join(pairs)}


def caption_chat(scene: Scene, rng: np.random.Generator | None = None) -> list[dict[str, Any]]:
    """A chat in which the assistant lists the scene's objects from left to right or, with a random
    stream, in any order: then what it has said so far names what is to be found next, as questions
    do.
    """
    shapes = sorted(scene.shapes, key=lambda s: (s.x, s.y))
    if rng is not None:
        rng.shuffle(shapes)
    caption = ", ".join(f"{s.colour} {s.kind} {s.digit}" for s in shapes) + "."
    return [_user(CAPTION, ["image"]), {"role": "assistant", "content": caption}]


def question_chat(scene: Scene, rng: np.random.Generator, most: int) -> list[dict[str, Any]]:
    """A chat of up to `most` questions on different objects of the scene; its first turn is
    `refer`'s prompt."""
    asked = [scene.shapes[i] for i in rng.permutation(len(scene.shapes))[:most]]
    return _chat(
        [
            Query(QUESTION.format(colour=s.colour, kind=s.kind), str(s.digit), [], "digit", 0)
            for s in asked
        ]
    )


def _chat(queries: list[Query], before: Sequence[str] = ("image",)) -> list[dict[str, Any]]:
    """A chat of questions and their answers; pictures (or a video) stand before the first."""
    chat: list[dict[str, Any]] = []
    for query in queries:
        chat.append(_user(query.question, () if chat else before))
        chat.append({"role": "assistant", "content": query.answer})
    return chat


def _user(text: str, before: Sequence[str]) -> dict[str, Any]:
    """The user's turn; `before` the words an "image" or several, a "video", or nothing."""
    words = {"type": "text", "text": text}
    return {
        "role": "user",
        "content": [*({"type": kind} for kind in before), words] if before else [words],
    }


def tokenize(
    processor: ProcessorMixin, chats: list[list[dict]], pads: dict[str, str]
) -> dict[str, np.ndarray]:
    """Right-padded ids of chats, whose pictures or video take the place of their placeholders as
    `pads` says; labels on what the assistant says."""
    tokenizer = processor.tokenizer
    texts = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
    for placeholder, tokens in pads.items():
        texts = [text.replace(placeholder, tokens) for text in texts]
    rows = tokenizer(texts)["input_ids"]
    ids = np.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = np.full_like(ids, IGNORED)
    opening = tokenizer("<|im_start|>assistant\n")["input_ids"]
    end, symbols = tokenizer.eos_token_id, [*DIGITS, *LETTERS, "yes", "no"]
    # " A" may be one token
    spoken = tokenizer([*symbols, *(f" {symbol}" for symbol in symbols)])["input_ids"]
    last = [tokens[-1] for tokens in spoken]
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
    return {"input_ids": ids, "labels": labels, "answers": np.isin(labels, last)}


@lru_cache(maxsize=4)
def _processor(name: str) -> Any:
    return build_processor(name)
