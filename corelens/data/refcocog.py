"""RefCOCOg from your own copy: expressions that refer to one object of a COCO picture, with its box
or mask.

    refcocog/instances.json                        COCO's images, annotations and categories of the
                                                   set
    refcocog/refs(umd).p, refcocog/refs(google).p  which expressions refer to what, and their split;
                                                   or the same list as JSON, refs(umd).json
    images/mscoco/images/train2014/COCO_train2014_000000000009.jpg …
                                                   (or images/train2014, or train2014)

as https://github.com/lichengunc/refer publishes and reads it (refer.py, README): each ref has
ref_id, ann_id, image_id, split and sentences (sent_id, sent, raw, tokens); a picture's file name is
the one in instances.json. Splits: umd has train, val and test; google has train and val, its test
split was never released.

**Pickle.** `refs(….p)` is a pickle, and a pickle can run code. It does so only by naming a function
(every opcode that calls one, REDUCE, INST, OBJ, NEWOBJ, BUILD and the extension registry, needs one
that `find_class` returned). The reader here refuses every name, so that lists, dictionaries, texts
and numbers are all it can build; a file with anything else is refused. That the published file
holds nothing else could not be checked here: if it is refused, write its list as refs(umd).json.

**The question** is ours: "Please provide the bounding box of the region this sentence describes:
<expression>", close to what many models were trained on; pass `prompt=` for another. What arXiv
2606.05843 asked is not known to us. The answer is the box in thousandths of the picture's width and
height, "[x0, y0, x1, y1]", or in pixels.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.files import fields, has, keep_readable, read_json, take, there
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box, Mask, Region

PROMPT = "Please provide the bounding box of the region this sentence describes: {expression}"
SPLITS = {"umd": ("train", "val", "test"), "google": ("train", "val")}
IMAGES = ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014")


def refcocog(
    root: str | Path,
    split: str = "val",
    by: Literal["umd", "google"] = "umd",
    n: int | None = None,
    seed: int | None = None,
    region: Literal["box", "mask"] = "box",
    units: Literal["thousandths", "pixels"] = "thousandths",
    prompt: str = PROMPT,
) -> list[Sample]:
    """One sample for each expression, scored by the overlap of boxes ("box_iou").

    Args:
        root: the folder that holds `refcocog` and `images`.
        split: "train", "val" or, for umd, "test".
        by: whose split: "umd" (no picture in two splits) or "google".
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.
        region: the object's box, or its mask (polygons; what is annotated otherwise falls back to
            the box).
        units: of the answer's numbers.
        prompt: with {expression} in it.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            pictures are broken.
    """
    return keep_readable(
        take(stream(root, split, by, region, units, prompt), n, seed), f"RefCOCOg {by} {split}"
    )


def stream(
    root: str | Path,
    split: str,
    by: str,
    region: str = "box",
    units: str = "thousandths",
    prompt: str = PROMPT,
) -> Iterator[Sample]:
    """The samples of one split, one after the other, pictures unseen."""
    if split not in SPLITS.get(by, ()):
        raise CorelensError(
            f"split {split!r} by {by!r}",
            "; ".join(f"by {name!r}: {', '.join(splits)}" for name, splits in SPLITS.items()),
            "choose one of these",
        )
    base = _base(Path(root))
    refs = _refs(
        there(base, f"refs({by}).json", f"refs({by}).p", what=f"RefCOCOg's expressions by {by}")
    )
    instances = there(base, "instances.json", what="RefCOCOg's annotations")
    folder = there(root, *IMAGES, what="COCO's pictures of train2014")
    content = read_json(instances)
    images, annotations, _ = fields(content, "images", "annotations", "categories", where=instances)
    image_of, annotation_of = {x["id"]: x for x in images}, {x["id"]: x for x in annotations}
    for ref in refs:
        name, ann, sentences = fields(ref, "split", "ann_id", "sentences", where=f"refs({by})")
        if name != split:
            continue
        if ann not in annotation_of:
            raise CorelensError(
                f"{instances}, without annotation {ann} of refs({by})",
                "the instances.json that goes with it",
                "get both again",
            )
        annotation = annotation_of[ann]
        image = image_of[annotation["image_id"]]
        for sentence in sentences:
            yield _sample(
                annotation, image, sentence, folder, f"{by}-{split}", region, units, prompt
            )


def _sample(
    annotation: dict[str, Any],
    image: dict[str, Any],
    sentence: dict[str, Any],
    folder: Path,
    split: str,
    region: str,
    units: str,
    prompt: str,
) -> Sample:
    x, y, w, h = annotation["bbox"]
    wide, high = image["width"], image["height"]
    box = Box(max(x, 0), max(y, 0), min(x + w, wide), min(y + h, high))
    scale = (1000 / wide, 1000 / high) if units == "thousandths" else (1, 1)
    answer = [
        round(box.x0 * scale[0]),
        round(box.y0 * scale[1]),
        round(box.x1 * scale[0]),
        round(box.y1 * scale[1]),
    ]
    return Sample(
        images=[str(folder / image["file_name"])],
        question=prompt.format(expression=sentence["sent"]),
        answer=str(answer),
        regions=[_mask(annotation, wide, high) or box if region == "mask" else box],
        id=f"refcocog-{split}-{sentence['sent_id']}",
        meta={
            "set": "refcocog",
            "scoring": "box_iou",
            "box": answer,
            "expression": sentence["sent"],
        },
    )


def _mask(annotation: dict[str, Any], wide: int, high: int) -> Region | None:
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list):
        return None
    canvas = Image.new("1", (wide, high))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon(polygon, fill=1)
    mask = np.asarray(canvas)
    return Mask(mask) if mask.any() else None


class _PlainData(pickle.Unpickler):
    """Reads a pickle of lists, dictionaries, texts and numbers; refuses whatever names a function
    or class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _refs(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".json":
        content = read_json(file)
    else:
        try:
            with file.open("rb") as data:  # written by Python 2, whose texts are bytes
                content = _PlainData(data, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a broken pickle raises nearly anything
            raise CorelensError(
                f"{file}, which was not read ({type(error).__name__}: {error})",
                "a pickle of lists, dictionaries, texts and numbers, as published; nothing in it "
                "is run",
                f"get it again, or write its list as {file.with_suffix('.json').name}",
            ) from error
    if not isinstance(content, list) or not all(isinstance(ref, dict) for ref in content):
        raise CorelensError(f"{file}, a {type(content).__name__}", "a list of refs", "get it again")
    return content


def _base(root: Path) -> Path:
    return root / "refcocog" if (root / "refcocog").is_dir() else root


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of RefCOCOg, or the beginning of one."""
    names = [f"refs({by}).{ending}" for by in SPLITS for ending in ("p", "json")]
    return (root / "refcocog").is_dir() or has(root, *names)


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The splits whose refs are there (all of them if none is), by name: the options of
    `stream`."""
    base = _base(root)
    splits = [by for by in SPLITS if has(base, f"refs({by}).json", f"refs({by}).p")]
    return {
        f"{by} {split}": {"by": by, "split": split}
        for by in splits or SPLITS
        for split in SPLITS[by]
    }
