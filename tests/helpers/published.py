"""Small made files in the exact published format of each public set; pictures are noise, videos
count their frames."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.samples import picture


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_picture(path: Path, seed: int = 0, size=(96, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path)


def write_video(path: Path, frames: int, size=(64, 48), fps: int = 10) -> None:
    """Frame i is grey of level 8·i; a key frame every 10."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 10
        stream.bit_rate = 8_000_000
        for i in range(frames):
            grey = np.full((size[1], size[0], 3), 8 * i, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def python2_pickle(value: Any) -> bytes:
    """As Python 2's pickle wrote lists, dictionaries, byte texts and numbers (protocol 0)."""

    def part(x: Any) -> bytes:
        if isinstance(x, list):
            return b"(l" + b"".join(part(value) + b"a" for value in x)
        if isinstance(x, dict):
            return b"(d" + b"".join(part(key) + part(value) + b"s" for key, value in x.items())
        return f"I{x}\n".encode() if isinstance(x, int) else f"S{x!r}\n".encode()

    return part(value) + b"."


def refcocog(root: Path, count: int = 2) -> Path:
    """`count` pictures with one object and two expressions each; the last object is in "test", the
    others in "val"."""
    images, annotations, refs = [], [], []
    for i in range(count):
        name = f"COCO_train2014_{i:012d}.jpg"
        write_picture(root / "images/mscoco/images/train2014" / name, i)
        images.append({"id": i, "file_name": name, "width": 96, "height": 64})
        annotations.append({
            "id": 100 + i, "image_id": i, "category_id": 1, "bbox": [12.0, 8.0, 48.0, 32.5], "iscrowd": 0, "area": 1560.0,
            "segmentation": [[12.0, 8.0, 60.0, 8.0, 60.0, 40.5]],
        })  # fmt: skip
        sentences = [
            {"sent_id": 10 * i + j, "sent": words, "raw": words, "tokens": words.split()}
            for j, words in enumerate(("the man in red", "a man on the left"))
        ]
        split = "test" if i == count - 1 else "val"
        refs.append({
            "ref_id": i, "ann_id": 100 + i, "image_id": i, "category_id": 1, "split": split,
            "file_name": f"COCO_train2014_{i:012d}_{100 + i}.jpg", "sent_ids": [10 * i, 10 * i + 1], "sentences": sentences,
        })  # fmt: skip
    categories = [{"id": 1, "name": "person", "supercategory": "person"}]
    content = {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    write_json(root / "refcocog/instances.json", content)
    (root / "refcocog/refs(umd).p").write_bytes(python2_pickle(refs))
    google = [ref | {"split": "val"} for ref in refs]
    write_json(root / "refcocog/refs(google).json", google)
    return root


def vidstg(root: Path) -> Path:
    """One video of 30 frames; the target moves two pixels to the right in each frame from 12 to
    20."""
    write_video(root / "video/0000/2401075277.mp4", 30)
    record = {
        "vid": "2401075277", "fps": 10.0, "frame_count": 30, "width": 64, "height": 48,
        "used_segment": {"begin_fid": 4, "end_fid": 28}, "temporal_gt": {"begin_fid": 12, "end_fid": 21},
        "subject/objects": [{"tid": 0, "category": "child"}, {"tid": 1, "category": "ball/sports_ball"}],
        "used_relation": {"subject_tid": 0, "object_tid": 1, "predicate": "watch", "begin_fid": 12, "end_fid": 21},
        "captions": [{"description": "the child is watching the ball.", "type": "person", "target_id": 0}],
        "questions": [
            {"description": "who is watching the ball?", "type": "person", "target_id": 0},
            {"description": "what does the child watch?", "type": "object", "target_id": 1},
        ],
    }  # fmt: skip
    write_json(root / "annotations/val_annotations.json", [record])
    write_json(root / "annotations/val_files.json", ["2401075277"])

    def seen(frame: int) -> list[dict[str, Any]]:
        box = {"xmin": 2 * frame - 20, "ymin": 10, "xmax": 2 * frame, "ymax": 30}
        return (
            [{"tid": tid, "bbox": box, "generated": 0, "tracker": "none"} for tid in (0, 1)]
            if 12 <= frame < 21
            else []
        )

    annotation = {
        "version": "VERSION 1.0", "video_id": "2401075277", "video_hash": "", "video_path": "0000/2401075277.mp4",
        "frame_count": 30, "fps": 10.0, "width": 64, "height": 48, "subject/objects": record["subject/objects"],
        "trajectories": [seen(frame) for frame in range(30)], "relation_instances": [],
    }  # fmt: skip
    write_json(root / "vidor/training/0000/2401075277.json", annotation)
    return root


def mmdocir(root: Path) -> Path:
    """Two documents of 6 and 3 pages; pages of 120 × 160 pixels show 60 × 80 points."""
    root.mkdir(parents=True, exist_ok=True)

    def jpeg(seed: int) -> bytes:
        data = BytesIO()
        picture(seed, (120, 160)).save(data, "JPEG")
        return data.getvalue()

    def asked(words: str, pages: list[int], boxes: list[list[float]]) -> dict[str, Any]:
        mapping = [
            {"page": page, "page_size": [60.0, 80.0], "bbox": box}
            for page, box in zip(pages, boxes, strict=True)
        ]
        return {
            "Q": words,
            "A": "42",
            "page_id": sorted(set(pages)),
            "type": "['Chart']",
            "layout_mapping": mapping,
        }

    first = [
        asked("What is the total?", [4], [[10, 20, 30, 40.5]]),
        asked("Which two?", [1, 2], [[5, 5, 50, 90], [9, 9, 9, 20]]),
    ]
    second = [asked("Where?", [2], [[0, 0, 60, 80]])]
    write_lines(root / "MMDocIR_annotations.jsonl", [
        {"doc_name": "b.pdf", "domain": "News", "page_indices": [3, 8], "layout_indices": [1, 1], "questions": first},
        {"doc_name": "a.pdf", "domain": "Laws", "page_indices": [0, 2], "layout_indices": [0, 0], "questions": second},
    ])  # fmt: skip
    rows = [("a.pdf", page) for page in range(3)] + [("b.pdf", page) for page in range(6)]
    pages = [
        {"doc_name": name, "domain": "News", "passage_id": str(page), "image_path": f"{name}_{page}.jpg",
         "image_binary": jpeg(i), "ocr_text": "", "vlm_text": ""}
        for i, (name, page) in enumerate(rows)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(pages), root / "MMDocIR_pages.parquet", row_group_size=4)
    layouts = [
        {"doc_name": name, "domain": "News", "type": "text", "layout_id": i, "page_id": page, "image_path": "", "image_binary": b"",
         "text": text, "ocr_text": "", "vlm_text": "", "bbox": box, "page_size": [60.0, 80.0]}
        for i, (name, page, box, text) in enumerate([("a.pdf", 2, [0.0, 0.0, 60.0, 80.0], ""), ("b.pdf", 4, [10.0, 20.0, 30.0, 40.5], "Total 42")])
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(layouts), root / "MMDocIR_layouts.parquet")
    return root


def mmlongbench_doc(root: Path) -> Path:
    """One document of four pages of 50 × 70.5 points."""
    pages = [picture(i, (100, 141)) for i in range(4)]
    (root / "documents").mkdir(parents=True, exist_ok=True)
    pages[0].save(
        root / "documents/report.pdf", save_all=True, append_images=pages[1:], resolution=144
    )

    def asked(words: str, answer: str, pages: str, form: str) -> dict[str, str]:
        return {
            "doc_id": "report.pdf", "doc_type": "Brochure", "question": words, "answer": answer, "evidence_pages": pages,
            "evidence_sources": "['Chart']", "answer_format": form,
        }  # fmt: skip

    write_json(root / "samples.json", [
        asked("How many?", "8", "[2, 4]", "Int"), asked("Which?", "['White', '10%']", "[1]", "List"),
        asked("What colour?", "Blue", "[0]", "Str"), asked("When?", "Not answerable", "[]", "None"),
    ])  # fmt: skip
    return root


def mmlongbench(root: Path) -> Path:
    """One file or more of each of the five kinds, at 8K."""
    data, images = root / "mmlb_data", root / "mmlb_image"
    names = [f"mmlongbench-doc/abc/abc_page{i}.jpg" for i in (3, 4)] + [
        "mmlongbench-doc/xyz/xyz_page4.jpg"
    ]
    slides = [f"slideVQA/deck/deck-{i}-1024.jpg" for i in (1, 2)]
    needles, choices = ["mm-niah/a.jpg", "mm-niah/b.jpg"], ["mm-niah/c.jpg", "mm-niah/d.jpg"]
    more = [
        "vh/1.jpg",
        "vh/2.jpg",
        "infoseek/oven_1.jpg",
        "gov-report/g/g_page0.jpg",
        "cars/1.jpg",
        "cars/2.jpg",
        "cars/3.jpg",
    ]
    for i, name in enumerate([*names, *slides, *needles, *choices, *more]):
        write_picture(images / name, i, (64, 64))
    page = {"answer_sources": ["Chart"], "length": 7000}
    write_lines(data / "documentQA/mmlongdoc_K8.jsonl", [
        {"id": "mmlongdoc_4", "doc_name": "abc", "question": "What range?", "answer": "0-375 miles", "ans_page_list": [4],
         "answer_format": "String", "page_list": names, **page}])  # fmt: skip
    write_lines(data / "documentQA/slidevqa_K8.jsonl", [
        {"id": "slideVQA_0", "doc_name": "deck", "question": "How many?", "answer": "12", "ans_page_list": [1],
         "answer_format": "Integer", "page_list": slides, **page}])  # fmt: skip
    write_lines(data / "NIAH/vh_single_test_1000_K8_dep6.jsonl", [
        {"id": "0", "question": "Is there a dog?", "answer": "Yes", "ctxs": ["vh/1.jpg", "vh/2.jpg"]}])  # fmt: skip
    context = [{"type": "text", "text": "Once upon a time"}, {"type": "image", "text": "<image>", "image": needles[0]},
               {"type": "image", "text": "<image>", "image": needles[1]}]  # fmt: skip
    niah = {"id": "1", "ctxs": context, "image_list": needles, "positive_ctxs": [context[2]]}
    write_lines(data / "NIAH/retrieval-image_test_K8_dep6.jsonl", [
        niah | {"question": "Which one stands in the text?", "answer": 1, "choices_image": choices}])  # fmt: skip
    write_lines(data / "NIAH/counting-image_test_K8_dep3.jsonl", [
        niah | {"question": "How often does <image> occur in each picture?", "answer": [1, 0], "needle_image_list": choices[:1]}])  # fmt: skip
    write_lines(
        data / "NIAH/retrieval-text_test_K8_dep6.jsonl",
        [niah | {"question": "Where is the cup?", "answer": "the kitchen"}],
    )
    write_lines(data / "vrag/infoseek_K8_dep3.jsonl", [
        {"id": "2", "question": "Who built it?", "answer": ["Gaudí", "Antoni Gaudí"], "image": "infoseek/oven_1.jpg",
         "ctxs": [{"title": "Park", "text": "Built by Gaudí.", "doc_id": "9"}]}])  # fmt: skip
    shots = [[[{"id": 0, "image": "cars/1.jpg"}, {"id": 1, "image": "cars/2.jpg"}]]]
    write_json(data / "ICL/cars196_K8.json", {
        "cars": {"exemplar_list": shots, "test_example": [{"id": "t0", "image": "cars/3.jpg", "answer": 1, "name": "a car"}]}})  # fmt: skip
    write_lines(data / "summ/gov_K8.jsonl", [
        {"id": "g", "image_list": ["gov-report/g/g_page0.jpg"], "summary": [{"section_title": "Why", "paragraphs": ["It was due."]}]}])  # fmt: skip
    return root


def mlvu(root: Path) -> Path:
    """One video and two multiple-choice questions (one whose answer is no candidate), and a
    summary."""
    write_video(root / "video/2_needle/needle_32.mp4", 30)
    write_video(root / "video/9_summary/217.mp4", 12)
    asked = {"video": "needle_32.mp4", "duration": 3.0, "question": "What does the hand do?", "question_type": "findNeedle",
             "candidates": ["Delivers", "Shakes", "Takes", "Points"], "answer": "Takes"}  # fmt: skip
    write_json(root / "json/2_needle.json", [asked, asked | {"answer": "Waves"}])
    summary = {
        "video": "217.mp4",
        "duration": 1.2,
        "question": "Please summarize.",
        "answer": "Waves.",
        "question_type": "summary",
    }
    write_json(root / "json/9_summary.json", [summary])
    return root


def mm_niah(root: Path) -> Path:
    """A question of each kind of answer: a word, a list, a letter of texts, a letter of pictures."""
    folder = root / "mm_niah_val"
    for name in ("cat.jpg", "dog.jpg", "needle.jpg"):
        write_picture(folder / "images" / name)
    meta = {"placed_depth": [0.3], "context_length": 1023, "context_length_text": 700, "context_length_image": 323,
            "num_images": 1, "needles": ["The cup is in the kitchen."], "choices": None, "choices_image_path": None}  # fmt: skip
    document = {
        "id": 0,
        "images_list": ["cat.jpg"],
        "context": "Once <image> there was a cup.",
        "meta": meta,
    }
    write_lines(
        folder / "annotations/retrieval-text.jsonl",
        [document | {"question": "Where is the cup?", "answer": "kitchen"}],
    )
    write_lines(
        folder / "annotations/counting-text.jsonl",
        [document | {"question": "How many? Answer with a list.", "answer": [2, 4]}],
    )
    image = meta | {"needles": ["needle.jpg"], "num_images": 2, "choices": ["a cat", "a dog"]}
    shown = {
        "id": 0,
        "images_list": ["cat.jpg", "needle.jpg"],
        "context": "Once <image> and <image>.",
    }
    write_lines(
        folder / "annotations/retrieval-image.jsonl",
        [shown | {"question": "What is it?", "answer": 1, "meta": image}],
    )
    pictured = image | {"choices": None, "choices_image_path": ["dog.jpg", "cat.jpg"]}
    write_lines(folder / "annotations/reasoning-image.jsonl",
                [shown | {"question": "Which picture is it?", "answer": 0, "meta": pictured | {"context_length": 9000}}])  # fmt: skip
    return root


def videomme(root: Path) -> Path:
    """One video and two questions about it, in a parquet file."""
    import pyarrow
    from pyarrow import parquet

    write_video(root / "data/fFjv93ACGo8.mp4", 30)
    row = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History",
           "url": "https://www.youtube.com/watch?v=fFjv93ACGo8", "videoID": "fFjv93ACGo8", "question_id": "001-1",
           "task_type": "Counting Problem", "question": "How many balls are there?",
           "options": ["A. Four.", "B. Three.", "C. Five.", "D. None."], "answer": "C"}  # fmt: skip
    rows = [row, row | {"question_id": "001-2", "duration": "long", "answer": "A"}]
    (root / "videomme").mkdir(parents=True)
    parquet.write_table(
        pyarrow.Table.from_pylist(rows), root / "videomme/test-00000-of-00001.parquet"
    )
    return root


MAKERS = {
    make.__name__: make
    for make in (
        *(refcocog, vidstg, mmdocir, mmlongbench_doc, mmlongbench, mlvu),
        *(mm_niah, videomme),
    )
}
