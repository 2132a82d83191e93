"""MMLongBench from your own copy: five kinds of tasks for long-context vision-language models, at
8K to 128K tokens.

    mmlb_data/documentQA/mmlongdoc_K8.jsonl …      0_mmlb_data.tar.gz, unpacked: vrag, NIAH, ICL,
                                                   summ, documentQA
    mmlb_image/…                                   the picture archives, unpacked; questions name
                                                   paths below it

as https://github.com/EdinburghNLP/MMLongBench publishes and reads it (data.py, configs/*.yaml,
README; arXiv 2505.10610). `TASKS` lists the files; K is the length in thousands of tokens. The
published data were not at hand: the fields are those that data.py reads, and `ans_page_list` is as
the README explains it (pages from 0; SlideVQA's file names count from 1).

| kind | tasks | regions | score |
|---|---|---|---|
| documentQA | longdocurl, mmlongdoc, slidevqa | the answer's pages, whole, where shown | doc_qa |
| NIAH | vh_single, vh_multi | none are published | binary_acc |
| NIAH | {retrieval,counting,reasoning}-{text,image} | `positive_ctxs` | sub_em, soft_acc, mc_acc |
| vrag | infoseek, viquae | none: the evidence is text | sub_em |
| ICL | cars196, food101, inat2021, sun397 | none | cls_acc |
| summ | gov, lexsum | none | rouge (no score here) |

That `positive_ctxs` of the needle tasks name a picture under `image` comes from a third party's
notes and is not verified; without it there are no regions. The demonstrations of ICL are one of the
published lists, drawn and shuffled by the sample's number (the benchmark draws anew in each run).

**The prompt** is ours, in `PROMPTS`, one for each kind, with {context} and {question} in the
benchmark's order; for its own words pass `prompt=`, copied from data.py. The gold answer is bare;
the benchmark has models begin with "Answer:".
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from corelens.data.files import (
    IMAGE,
    fields,
    has,
    keep_readable,
    natural,
    read_json,
    read_lines,
    take,
    text_and_images,
    there,
)
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

TASKS = {
    "infoseek": "vrag/infoseek_K{k}_dep3.jsonl",
    "viquae": "vrag/viquae_K{k}_dep6.jsonl",
    "vh_single": "NIAH/vh_single_test_1000_K{k}_dep6.jsonl",
    "vh_multi": "NIAH/vh_multi_test_1000_K{k}_dep3.jsonl",
    "retrieval-text": "NIAH/retrieval-text_test_K{k}_dep6.jsonl",
    "counting-text": "NIAH/counting-text_test_K{k}_dep3.jsonl",
    "reasoning-text": "NIAH/reasoning-text_test_K{k}_dep3.jsonl",
    "retrieval-image": "NIAH/retrieval-image_test_K{k}_dep6.jsonl",
    "counting-image": "NIAH/counting-image_test_K{k}_dep3.jsonl",
    "reasoning-image": "NIAH/reasoning-image_test_K{k}_dep6.jsonl",
    "cars196": "ICL/cars196_K{k}.json",
    "food101": "ICL/food101_K{k}.json",
    "inat2021": "ICL/inat2021_K{k}.json",
    "sun397": "ICL/sun397_K{k}.json",
    "gov": "summ/gov_K{k}.jsonl",
    "lexsum": "summ/lexsum_K{k}.jsonl",
    "longdocurl": "documentQA/longdocurl_K{k}.jsonl",
    "mmlongdoc": "documentQA/mmlongdoc_K{k}.jsonl",
    "slidevqa": "documentQA/slidevqa_K{k}.jsonl",
}
PROMPTS = {
    "vrag": "{context}\n\nAnswer in a few words, from these documents, about what the picture "
    "shows.\n{question}",
    "NIAH": "{context}\n\nAnswer from the text and the pictures above.\n{question}",
    "ICL": "{context}\n\n{question}",
    "summ": "{context}\n\n{question}",
    "documentQA": "{context}\n\nAnswer in a few words, or 'Not answerable' if the pages do not "
    "say.\n{question}",
}
SUMMARY = {
    "gov": "Summarise this report in about 550 words: why the study was made, what was found, what "
    "is recommended.",
    "lexsum": "Summarise this law case in one paragraph of 200 to 250 words: background, parties, "
    "outcome.",
}


def mmlongbench(
    root: str | Path,
    task: str = "mmlongdoc",
    length: int = 8,
    n: int | None = None,
    seed: int | None = None,
    prompt: str | None = None,
) -> list[Sample]:
    """One sample for each question: a chat in which text and pictures alternate as in the
    benchmark.

    Args:
        root: the folder that holds `mmlb_data` and `mmlb_image`.
        task: one of `TASKS`.
        length: in thousands of tokens; which of the task's files.
        n: how many (the files of long contexts have gigabytes); all by default.
        seed: draw the n at random instead of taking the first.
        prompt: with {context} and {question} in it; by default `PROMPTS` of the task's kind.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            pictures are broken.
    """
    return keep_readable(
        take(stream(root, task, length, prompt), n, seed), f"MMLongBench {task} K{length}"
    )


def stream(
    root: str | Path, task: str, length: int = 8, prompt: str | None = None
) -> Iterator[Sample]:
    """The samples of one file, one after the other; of the pictures only the sizes of answer pages
    are read."""
    if task not in TASKS:
        raise CorelensError(f"task {task!r}", f"one of {', '.join(TASKS)}", "choose one of these")
    file = there(
        root,
        "mmlb_data/" + TASKS[task].format(k=length),
        what=f"MMLongBench's {task} of {length}K tokens",
    )
    folder = there(root, "mmlb_image", what="MMLongBench's pictures")
    kind = TASKS[task].split("/")[0]
    make = {
        "documentQA": _pages,
        "NIAH": _needle,
        "vrag": _documents,
        "ICL": _shots,
        "summ": _summary,
    }[kind]
    records = _examples(file) if kind == "ICL" else read_lines(file)
    for number, record in enumerate(records):
        name = f"mmlongbench-{task}-K{length}-{number}"
        meta = {"task": task, "length": length, "kind": kind}
        yield _sample(name, make(record, task, file), prompt or PROMPTS[kind], folder, meta)


def _sample(
    name: str, asked: dict[str, Any], prompt: str, folder: Path, meta: dict[str, Any]
) -> Sample:
    """A chat of one turn: the prompt with a picture wherever it says <image>; the question is a
    part of its own."""
    before, after = (
        half.replace("{context}", asked["context"]) for half in prompt.split("{question}")
    )
    pieces = [
        *text_and_images(before),
        *text_and_images(asked["question"]),
        *text_and_images(after),
    ]
    images = [str(folder / image) for image in asked["images"]]
    slots = pieces.count(IMAGE)
    if slots != len(images):
        raise CorelensError(
            f"{name}: {slots} places for pictures and {len(images)} pictures",
            "as many",
            "get the file again",
        )
    content = [
        {"type": "image"} if piece == IMAGE else {"type": "text", "text": piece} for piece in pieces
    ]
    words = [piece for piece in text_and_images(asked["question"]) if piece != IMAGE]
    regions = []
    for number in asked.get("evidence", []):
        try:
            with Image.open(images[number]) as page:
                regions.append(Box(0, 0, *page.size, image=number))
        except OSError:
            continue  # the picture is counted as broken, and its sample left out, by keep_readable
    answers = asked["answer"] if isinstance(asked["answer"], list) else [asked["answer"]]
    return Sample(
        messages=[{"role": "user", "content": content}],
        images=images,
        question=max(words, key=len),
        answer=str(answers[0]),
        regions=list(regions),
        id=name,
        meta={
            "set": "mmlongbench",
            "scoring": asked["scoring"],
            "answers": answers,
            **meta,
            **asked.get("meta", {}),
        },
    )


# --- the five kinds


def _pages(record: dict[str, Any], task: str, file: Path) -> dict[str, Any]:
    question, answer, document, pages, form = fields(
        record, "question", "answer", "doc_name", "page_list", "answer_format", where=file
    )
    return {
        "context": "\n\n".join(
            f"Document {Path(page).parent.name[:15]}: {IMAGE}" for page in pages
        ),
        "question": f"About document {document[:15]}: {question}",
        "images": pages,
        "answer": answer,
        "scoring": "doc_qa",
        "evidence": _answer_pages(record.get("ans_page_list") or [], pages, document, task),
        "meta": {"answer_format": form, "document": document},
    }


def _answer_pages(wanted: list[int], pages: list[str], document: str, task: str) -> list[int]:
    """Where the answer's pages stand among those shown (documents are cut, and filled up with pages
    of others)."""
    endings = {f"-{page + 1}-1024" if task == "slidevqa" else f"_page{page}" for page in wanted}

    def holds_the_answer(page: Path) -> bool:
        return page.parent.name == document and page.stem.endswith(tuple(endings))

    return [number for number, page in enumerate(pages) if holds_the_answer(Path(page))]


def _needle(record: dict[str, Any], task: str, file: Path) -> dict[str, Any]:
    question, answer, contexts = fields(record, "question", "answer", "ctxs", where=file)
    if task.startswith("vh_"):
        return {
            "context": "\n".join([IMAGE] * len(contexts)), "question": question, "images": contexts,
            "answer": answer, "scoring": "binary_acc",
        }  # fmt: skip
    (images,) = fields(record, "image_list", where=file)
    scoring = "sub_em"
    if task.startswith("counting"):
        scoring, answer = "soft_acc", json.dumps(answer)
        images = images + (record["needle_image_list"] if task == "counting-image" else [])
    elif task.endswith("-image"):
        choices = record["choices_image"]
        scoring, answer, images = "mc_acc", ascii_uppercase[answer], images + choices
        question += "".join(
            f"\n{letter}. {IMAGE}" for letter, _ in zip(ascii_uppercase, choices, strict=False)
        )
    evidence = {
        context.get("image")
        for context in record.get("positive_ctxs") or []
        if isinstance(context, dict)
    } - {None}
    return {
        "context": "\n\n".join(context["text"] for context in contexts),
        "question": question,
        "images": images,
        "answer": answer,
        "scoring": scoring,
        "evidence": [i for i, image in enumerate(record["image_list"]) if image in evidence],
    }


def _documents(record: dict[str, Any], task: str, file: Path) -> dict[str, Any]:
    question, answer, contexts, image = fields(
        record, "question", "answer", "ctxs", "image", where=file
    )
    return {
        "context": "\n\n".join(
            f"Document (Title: {document['title']}): {document['text']}" for document in contexts
        ),
        "question": IMAGE + question,
        "images": [image],
        "answer": answer,
        "scoring": "sub_em",
    }


def _examples(file: Path) -> Iterator[dict[str, Any]]:
    """The test pictures of a classification file, each with the demonstrations of its domain."""
    for domain, group in read_json(file).items():
        lists, tests = fields(group, "exemplar_list", "test_example", where=f"{file}, {domain}")
        yield from (
            {"lists": lists, "seed": f"{domain} {number}", **test}
            for number, test in enumerate(tests)
        )


def _shots(record: dict[str, Any], task: str, file: Path) -> dict[str, Any]:
    rng = random.Random(record["seed"])
    rounds = [rng.sample(example, len(example)) for example in rng.choice(record["lists"])]
    shown = [example for group in rounds for example in group]
    return {
        "context": "\n\n".join(f"{IMAGE}\nlabel: {example['id']}" for example in shown),
        "question": f"{IMAGE}\nWhich label has this picture? Write 'label: ' and its number.",
        "images": [*(example["image"] for example in shown), record["image"]],
        "answer": record["answer"],
        "scoring": "cls_acc",
    }


def _summary(record: dict[str, Any], task: str, file: Path) -> dict[str, Any]:
    images, summary = fields(record, "image_list", "summary", where=file)
    if isinstance(summary, list):
        summary = "\n\n".join(
            "\n".join([section["section_title"] + ":", *section["paragraphs"]])
            for section in summary
        )
    return {
        "context": "\n\n".join(
            f"Page {Path(page).stem.split('page')[-1]}: {IMAGE}" for page in images
        ),
        "question": SUMMARY[task],
        "images": images,
        "answer": summary,
        "scoring": "rouge",
    }


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of MMLongBench, or the beginning of one."""
    return has(root, "mmlb_data", "mmlb_image")


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The files that are there, by task and length: the options of `stream`."""
    tasks = {}
    for task, name in TASKS.items():
        for file in sorted(
            Path(root, "mmlb_data").glob(name.format(k="*")), key=lambda path: natural(path.name)
        ):
            length = int(file.stem.split("_K")[-1].split("_")[0])
            tasks[f"{task} K{length}"] = {"task": task, "length": length}
    return tasks
