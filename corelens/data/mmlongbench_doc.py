"""MMLongBench-Doc from your own copy: questions about PDF documents of some 50 pages, and the pages
that answer them.

    samples.json       a list of {doc_id, doc_type, question, answer, evidence_pages,
                       evidence_sources, answer_format}
    documents/*.pdf    the documents, by doc_id

as https://github.com/mayubo2333/MMLongBench-Doc publishes it below `data/` (README, run_lvlm.py;
arXiv 2407.01523), or https://huggingface.co/datasets/yubo2333/MMLongBench-Doc with
data/train-*.parquet in place of samples.json (the same columns). `evidence_pages` is a list written
as text; pages count from 1. Regions are whole pages: the set says no more. A question that lists
none (or page 0, as three published ones do) has no region.

Pages are rendered when a model reads them, at 144 dpi as run_lvlm.py does, by pypdfium2 (there:
PyMuPDF; pixels may differ slightly); the `pages` nearest to the evidence are shown (the benchmark:
as many as the model takes, joined into larger pictures for some). The question is asked as it is.
The score is the benchmark's rule for the answer's format, without the step in which GPT-4o shortens
the answer first ("mmlongbench_doc"; `answerable_f1` for its F1).
"""

import ast
from collections.abc import Iterator
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image

from corelens.data.files import (
    choose_pages,
    fields,
    has,
    keep_readable,
    package,
    read_json,
    take,
    there,
)
from corelens.errors import CorelensError
from corelens.inputs.pictures import Later
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

QUESTIONS = ("samples.json", "data/samples.json")
DOCUMENTS = ("documents", "data/documents")
FIELDS = ("doc_id", "question", "answer", "evidence_pages", "answer_format")


def mmlongbench_doc(
    root: str | Path,
    n: int | None = None,
    seed: int | None = None,
    pages: int | None = 8,
    dpi: int = 144,
) -> list[Sample]:
    """One sample for each question, its pages rendered when a model reads them.

    Args:
        root: the repository, or its folder `data`.
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.
        pages: how many pages of the document to show; None shows all.
        dpi: of the rendered pages.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            documents are missing.
    """
    return keep_readable(take(stream(root, pages, dpi), n, seed), "MMLongBench-Doc")


def stream(root: str | Path, pages: int | None = 8, dpi: int = 144) -> Iterator[Sample]:
    """The samples, one after the other; of the documents only the pages' sizes are read."""
    file, records = _records(Path(root))
    folder = there(root, *DOCUMENTS, what="MMLongBench-Doc's documents")
    for number, record in enumerate(records):
        name, question, answer, pages_named, form = fields(record, *FIELDS, where=file)
        path = folder / Path(name).name
        sizes, broken = _sizes(path, dpi)
        listed = (
            ast.literal_eval(pages_named) if isinstance(pages_named, str) else list(pages_named)
        )
        evidence = [page - 1 for page in listed if 1 <= page <= len(sizes)]
        shown = choose_pages(len(sizes), evidence, pages)
        regions = [
            Box(0, 0, sizes[page][0], sizes[page][1], image=shown.index(page)) for page in evidence
        ]
        images = [
            Later(str(path), f"page {page + 1}", partial(_page, path, page, dpi), sizes[page])
            for page in shown
        ]
        yield Sample(
            images=images
            or [Later(str(path), "page 1", partial(_page, path, 0, dpi), broken=broken)],
            question=question,
            answer=answer,
            regions=list(regions),
            id=f"mmlongbench-doc-{number}",
            meta={
                "set": "mmlongbench_doc",
                "scoring": "mmlongbench_doc",
                "answer_format": form,
                "document": name,
                "kind": record.get("evidence_sources"),
                "pages": shown,
                "evidence_pages": evidence,
            },
        )


def _records(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    tables = sorted(root.glob("data/train-*.parquet"))
    if tables and not has(root, *QUESTIONS):
        read = package(
            "pyarrow", f"{tables[0]}, a parquet file", lambda: __import__("pyarrow.parquet").parquet
        )
        return tables[0], [row for table in tables for row in read.read_table(table).to_pylist()]
    file = there(root, *QUESTIONS, what="MMLongBench-Doc's questions")
    records = read_json(file)
    if not isinstance(records, list):
        raise CorelensError(
            f"{file}, a {type(records).__name__}", "a list of questions", "get it again"
        )
    return file, records


def _open(path: Path) -> Any:
    pdfium = package("pypdfium2", f"{path}, a PDF", lambda: __import__("pypdfium2"))
    try:
        return pdfium.PdfDocument(path)
    except (pdfium.PdfiumError, OSError) as error:
        raise CorelensError(
            f"{path}, which cannot be opened ({error})", "a whole PDF", "get the file again"
        ) from error


@lru_cache(maxsize=256)
def _sizes(path: Path, dpi: int) -> tuple[list[tuple[int, int]], str | None]:
    """The pixels of each rendered page, which rendering rounds up; of a broken document none, and
    why."""
    if not path.is_file():
        return [], "no such file"
    try:
        with _open(path) as document:
            points = [document.get_page_size(page) for page in range(len(document))]
    except CorelensError as error:
        if "not installed" in error.given:
            raise
        return [], error.given
    return [(ceil(wide * dpi / 72), ceil(high * dpi / 72)) for wide, high in points], None


def _page(path: Path, page: int, dpi: int) -> Image.Image:
    with _open(path) as document:
        # the pixels are pdfium's until they are copied
        return document[page].render(scale=dpi / 72).to_pil().copy()


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of MMLongBench-Doc, or the beginning of one."""
    return has(root, *QUESTIONS, *DOCUMENTS)


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The one part that it has: the options of `stream`."""
    return {"all": {}}
