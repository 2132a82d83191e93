"""MMDocIR (the evaluation set) from your own copy: questions about long documents, and the boxes
that answer them.

    MMDocIR_annotations.jsonl    one document a line: doc_name, page_indices, layout_indices,
                                 questions (Q, A, type, page_id, layout_mapping: page, page_size,
                                 bbox)
    MMDocIR_pages.parquet        one page a row: image_binary (a JPEG), doc_name, passage_id, …
    MMDocIR_layouts.parquet      one box a row: page_id, bbox, page_size, text, ocr_text, …; may be
                                 left out

as https://github.com/MMDocRAG/MMDocIR (dataset/README.md, search.py) and
https://huggingface.co/datasets/MMDocIR/MMDocIR_Evaluation_Dataset publish it (arXiv 2501.08828).
`page_indices` are the first and last row of a document's pages, the last one included (in the
published file 0 to 23, then 24 to 46); page ids count from 0. Boxes are in PDF points of
`page_size` and are scaled here to pixels of the page's picture: that the picture shows the whole
page is our reading of the format. One published box is empty and one leaves its page: boxes are
clipped, and a question without any box left has no layout region.

Two levels, as the set has them: `level="page"` marks the evidence pages whole, `level="layout"` the
boxes. Of a document the `pages` nearest to the evidence are shown (the longest has 843 in the
published file). A picture is read from the parquet file when a model needs it; the sizes of all
pages are read in one pass before. Where the file is one row group (as the published one seems to
be), the first look into a document reads the file up to its rows.

MMDocIR scores retrieval (`corelens.data.scoring.recall_at`) and defines no score for an answer:
ANLS is our choice.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from corelens.data.files import (
    choose_pages,
    fields,
    has,
    keep_readable,
    package,
    read_lines,
    take,
    there,
)
from corelens.errors import CorelensError
from corelens.inputs.pictures import Later
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

FILES = ("MMDocIR_annotations.jsonl", "MMDocIR_pages.parquet", "MMDocIR_layouts.parquet")


def mmdocir(
    root: str | Path,
    level: Literal["page", "layout"] = "layout",
    n: int | None = None,
    seed: int | None = None,
    pages: int | None = 8,
) -> list[Sample]:
    """One sample for each question, its pages read when a model needs them.

    Args:
        root: the folder with the three files, or the repository's with `dataset`.
        level: what the regions are: whole pages, or boxes on them.
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.
        pages: how many pages of the document to show; None shows all.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format.
    """
    return keep_readable(take(stream(root, level, pages), n, seed), f"MMDocIR {level}")


def stream(root: str | Path, level: str = "layout", pages: int | None = 8) -> Iterator[Sample]:
    """The samples, one after the other; of the pictures only the sizes are read."""
    if level not in ("page", "layout"):
        raise CorelensError(f"level {level!r}", "page or layout", "choose one of these")
    notes, table, layouts = (
        f"dataset/{name}" if has(Path(root), "dataset") else name for name in FILES
    )
    annotations = there(root, notes, what="MMDocIR's annotations")
    file = there(root, table, what="MMDocIR's pages")
    texts = Path(root, layouts) if level == "layout" and has(Path(root), layouts) else None
    number = 0
    for record in read_lines(annotations):
        name, rows, questions = fields(
            record, "doc_name", "page_indices", "questions", where=annotations
        )
        sizes = _sizes(file)[rows[0] : rows[1] + 1]
        if len(sizes) <= rows[1] - rows[0]:
            raise CorelensError(
                f"{file} of {len(_sizes(file))} rows, asked for rows {rows[0]} to {rows[1]} of "
                f"{name}",
                "the pages that go with the annotations",
                "get both files again",
            )
        for asked in questions:
            fields(asked, "Q", "A", "page_id", "layout_mapping", where=f"{annotations}, {name}")
            evidence = sorted(
                {*asked["page_id"], *(layout["page"] for layout in asked["layout_mapping"])}
            )
            shown = choose_pages(len(sizes), evidence, pages)
            boxes: list[Any] = []
            if level == "page":
                whole = [(page, size) for page in asked["page_id"] if (size := sizes[page])]
                boxes = [
                    Box(0, 0, size[0], size[1], image=shown.index(page)) for page, size in whole
                ]
            else:
                texts_of_boxes = _texts(texts, tuple(record["layout_indices"])) if texts else {}
                boxes = [
                    box
                    for layout in asked["layout_mapping"]
                    if (box := _box(layout, sizes, shown, texts_of_boxes))
                ]
            yield Sample(
                images=[_later(file, rows[0], len(sizes), page, sizes[page]) for page in shown],
                question=asked["Q"],
                answer=asked["A"],
                regions=boxes,
                id=f"mmdocir-{number}",
                meta={
                    "set": "mmdocir",
                    "scoring": "anls",
                    "document": name,
                    "domain": record.get("domain"),
                    "kind": asked.get("type"),
                    "pages": shown,
                    "evidence_pages": asked["page_id"],
                },
            )
            number += 1


def _later(file: Path, first: int, count: int, page: int, size: tuple[int, int] | None) -> Later:
    broken = None if size else "a picture whose header cannot be read"
    return Later(
        str(file), f"row {first + page}", partial(_page, file, first, count, page), size, broken
    )


def _box(
    annotation: dict[str, Any],
    sizes: list[tuple[int, int] | None],
    shown: list[int],
    texts: dict[Any, str],
) -> Box | None:
    """A layout's box in pixels of its page, clipped to it; None if nothing is left."""
    size = sizes[annotation["page"]]
    if size is None:
        return None
    (wide, high), (x, y) = annotation["page_size"], size
    x0, y0, x1, y1 = annotation["bbox"]
    x0, y0, x1, y1 = (
        max(x0, 0) * x / wide,
        max(y0, 0) * y / high,
        min(x1, wide) * x / wide,
        min(y1, high) * y / high,
    )
    if x1 <= x0 or y1 <= y0:
        return None
    return Box(
        x0,
        y0,
        x1,
        y1,
        image=shown.index(annotation["page"]),
        text=texts.get((annotation["page"], *annotation["bbox"])),
    )


# --- parquet


def _parquet(file: Path) -> Any:
    read = package(
        "pyarrow", f"{file}, a parquet file", lambda: __import__("pyarrow.parquet").parquet
    )
    try:
        return read.ParquetFile(file, memory_map=True, pre_buffer=False)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others
        raise CorelensError(
            f"{file}, which cannot be opened ({error})", "a whole parquet file", "get it again"
        ) from error


def _check_columns(file: Path, table: Any, columns: tuple[str, ...]) -> None:
    missing = [name for name in columns if name not in table.schema_arrow.names]
    if missing:
        raise CorelensError(
            f"{file}, without the columns {', '.join(missing)}; it has "
            f"{', '.join(table.schema_arrow.names)}",
            "the published columns",
            "get the set from its publisher; see docs/data.md",
        )


@lru_cache(maxsize=4)
def _rows(file: Path, first: int, count: int, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """`count` rows from `first` on; the row groups before them are skipped, the rows of theirs read
    past."""
    with _parquet(file) as table:
        _check_columns(file, table, columns)
        start, group = 0, 0
        while (
            group < table.num_row_groups
            and start + table.metadata.row_group(group).num_rows <= first
        ):
            start += table.metadata.row_group(group).num_rows
            group += 1
        rows: list[dict[str, Any]] = []
        groups = list(range(group, table.num_row_groups))
        for batch in table.iter_batches(batch_size=64, row_groups=groups, columns=list(columns)):
            skip = max(first - start, 0)
            rows += batch.slice(skip, count - len(rows)).to_pylist() if skip < len(batch) else []
            start += len(batch)
            if len(rows) == count:
                break
    return rows


@lru_cache(maxsize=1)
def _sizes(file: Path) -> list[tuple[int, int] | None]:
    """Width and height of every page, in one pass; None for a picture whose header cannot be
    read."""
    sizes: list[tuple[int, int] | None] = []
    with _parquet(file) as table:
        _check_columns(file, table, ("image_binary",))
        for batch in table.iter_batches(batch_size=64, columns=["image_binary"]):
            for data in batch.column(0):
                try:
                    sizes.append(Image.open(BytesIO(data.as_buffer())).size)
                # PIL raises OSError, SyntaxError and others; no bytes at all are an AttributeError
                except Exception:
                    sizes.append(None)
    return sizes


def _page(file: Path, first: int, count: int, page: int) -> Image.Image:
    return Image.open(BytesIO(_rows(file, first, count, ("image_binary",))[page]["image_binary"]))


@lru_cache(maxsize=2)
def _texts(file: Path, rows: tuple[int, int]) -> dict[Any, str]:
    """{(page, x0, y0, x1, y1): text} of a document's layouts."""
    layouts = _rows(file, rows[0], rows[1] - rows[0] + 1, ("page_id", "bbox", "text", "ocr_text"))
    texts = {
        (layout["page_id"], *layout["bbox"]): layout["text"] or layout["ocr_text"]
        for layout in layouts
    }
    return {key: text for key, text in texts.items() if text}


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of MMDocIR, or the beginning of one."""
    return has(root, *FILES, *(f"dataset/{name}" for name in FILES))


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """Its two levels, by name: the options of `stream`."""
    return {"page": {"level": "page"}, "layout": {"level": "layout"}}
