"""Files that somebody or something has changed: only the right load or a CorelensError, and in no
time."""

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import corelens as cl

SCORES = np.random.default_rng(0).random((6, 3, 4)).astype(np.float32)


def changed(blob: bytes, rng: random.Random) -> bytes:
    """One of the things that happen to files."""
    place, length = rng.randrange(len(blob)), rng.randrange(1, 40)
    kind = rng.randrange(6)
    if kind == 0:
        return blob[:place]
    if kind == 1:
        return blob[:place] + rng.randbytes(length) + blob[place + length :]
    if kind == 2:
        return blob[:place] + rng.randbytes(length) + blob[place:]
    if kind == 3:
        return blob[:place] + blob[place + length :]
    if kind == 4:
        return blob + rng.randbytes(length)
    return blob[:place] + bytes([blob[place] ^ 1 << rng.randrange(8)]) + blob[place + 1 :]


def test_500_changed_score_files(tmp_path):
    path = tmp_path / "s.safetensors"
    cl.HeadScores(per_sample=SCORES, meta={"metric": "ram", "samples": list("abcdef")}).save(path)
    blob, rng, loaded = path.read_bytes(), random.Random(0), 0
    for _ in range(500):
        path.write_bytes(changed(blob, rng))
        try:
            scores = cl.HeadScores.load(path)
        except cl.CorelensError:
            continue
        loaded += 1
        np.testing.assert_array_equal(scores.per_sample, SCORES)
        assert scores.meta == {"metric": "ram", "samples": list("abcdef")}
    assert loaded < 25  # (a change that puts the same bytes there)


def test_the_same_scores_are_the_same_bytes_in_every_process(tmp_path):
    script = (
        "import sys, numpy as np, corelens as cl; cl.HeadScores(np.ones((2, 2)), meta={'a': "
        "'é'}).save(sys.argv[1])"
    )
    for i in range(6):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / str(i))], check=True)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(6)}) == 1
    assert cl.HeadScores.load(tmp_path / "0").meta == {"a": "é"}


def test_every_flipped_byte_of_a_score_file_is_noticed(tmp_path):
    path = tmp_path / "s.safetensors"
    cl.HeadScores(np.ones((2, 2)), meta={"metric": "ram"}).save(path)
    blob = path.read_bytes()
    for place in range(len(blob)):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 0xFF]) + blob[place + 1 :])
        with pytest.raises(cl.CorelensError):
            cl.HeadScores.load(path)


LINES = [
    {"id": "a", "images": ["p.png"], "question": "What?", "answer": "7", "regions": [{"box": [1, 2, 30, 40], "text": "7"}]},
    {"video": ["p.png", "p.png"], "question": "When?", "regions": [{"tube": {"0": [1, 2, 3, 4]}}], "meta": {"fps": 2.0}},
    {"images": ["p.png"], "question": "Which?", "choices": ["a", "b"], "regions": [{"mask": "p.png", "image": 0}]},
]  # fmt: skip


def test_500_changed_sample_files(tmp_path):
    Image.new("RGB", (64, 48), "white").save(tmp_path / "p.png")
    file = tmp_path / "samples.jsonl"
    blob = "\n".join(json.dumps(line) for line in LINES).encode()
    rng = random.Random(1)
    file.write_bytes(blob)
    assert len(cl.data.load_samples(tmp_path)) == 3
    for _ in range(500):
        file.write_bytes(changed(blob, rng))
        try:
            assert all(isinstance(sample, cl.Sample) for sample in cl.data.load_samples(tmp_path))
        except cl.CorelensError as error:
            assert "samples.jsonl" in str(error)


@pytest.mark.parametrize(
    "line, field",
    [
        (b'{"images": ["p.png"], "question": "\xff\xfe"}', "(all)"),
        (b"[" * 100_000, "(all)"),
        (b'{"meta": ' * 3000, "(all)"),
        (b'{"images": ["p.png"], "question": "?", "regions": [{"box": [1, 2, 3, ' + b"9" * 5000 + b"]}]}", "regions[0].box[3]"),
        (b'{"images": ["p.png"], "question": "?", "meta": {"n": ' + b"9" * 5000 + b"}}", "meta.n"),
        (b'{"images": ["p.png"], "question": "?", "meta": {"n": NaN}}', "meta.n"),
        (b'{"images": ["' + b"p" * 5000 + b'"], "question": "?"}', "images[0]"),
        (b'{"images": ["p\\u0000"], "question": "?"}', "images[0]"),
        (b'{"video": ["p.png"], "question": "?", "regions": [{"tube": {"' + b"1" * 5000 + b'": [1, 2, 3, 4]}}]}', "regions[0].tube"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named_with_its_field(tmp_path, line, field):
    Image.new("RGB", (64, 48)).save(tmp_path / "p.png")
    (tmp_path / "samples.jsonl").write_bytes(json.dumps(LINES[0]).encode() + b"\n" + line)
    with pytest.raises(cl.CorelensError) as error:
        cl.data.load_samples(tmp_path)
    assert f"line 2, field {field!r}" in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"999999-999999": [1]}', "no scores for 0-0, 0-1, 0-2, 0-3, 0-4"),
        ('{"' + "9" * 5000 + '-1": [1]}', "the key"),
        ('{"0-0": [' + "9" * 5000 + "]}", "JSON"),
        ('{"0-0": [1e999]}', "finite"),
        ('{"٣-0": [1]}', "the key"),
        ("[" * 100_000, "JSON"),
        (b"\xff\xfe{}", "UTF-8"),
    ],
)
def test_importers_look_at_sizes_before_they_list_anything(tmp_path, content, words):
    path = tmp_path / "scores.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    for importer in (cl.HeadScores.from_sparsemm, cl.HeadScores.from_retrieval_head):
        with pytest.raises(cl.CorelensError, match=words):
            importer(path)
    assert time.monotonic() - start < 5


def test_duo_attentions_sizes_are_a_streaming(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("0.5\t1.0\n0.1\t0.2\n")
    bare = cl.HeadScores.from_duo_attention(tmp_path)
    assert "streaming" not in bare.meta
    with pytest.raises(cl.CorelensError, match="config.json"):
        cl.Streaming.of(bare)
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 64, "recent_size": 256}))
    for path in (tmp_path, tmp_path / "full_attention_heads.tsv"):
        scores = cl.HeadScores.from_duo_attention(path, n_heads=4)
        assert cl.Streaming.of(scores) == cl.Streaming(sink=64, window=256)
    scores.save(tmp_path / "s")
    assert cl.Streaming.of(cl.HeadScores.load(tmp_path / "s")) == cl.Streaming(sink=64, window=256)
    for wrong in (
        '{"sink_size": -1, "recent_size": 256}',
        '{"sink_size": 1}',
        "[]",
        "{",
        '{"sink_size": true}',
    ):
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(cl.CorelensError, match=r"config\.json"):
            cl.HeadScores.from_duo_attention(tmp_path)
    (tmp_path / "full_attention_heads.tsv").write_text("nan\t1.0\n")
    with pytest.raises(cl.CorelensError, match="finite"):
        cl.HeadScores.from_duo_attention(tmp_path)


def test_capacity_above_the_prompt_is_dropped_as_the_papers_code_does():
    scores = cl.HeadScores(np.array([[8.0, 1, 1, 1], [1, 1, 1, 1]]))
    shape = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    returned, dropped = (
        cl.KVBudget(scores, 100, window=10, give_back=back) for back in (True, False)
    )
    # s · (B − m) · L · n + m + window, by hand: B 90, m 9
    plain = np.rint(np.array([[9, 2], [2, 2]]) / 15 * 81 * 4 + 9).astype(int) + 10
    np.testing.assert_array_equal(dropped.capacities(**shape, length=120), np.minimum(plain, 120))
    assert (
        returned.capacities(**shape, length=120).sum()
        == plain.sum()
        > dropped.capacities(**shape, length=120).sum()
    )
    np.testing.assert_array_equal(dropped.capacities(**shape, length=40), np.minimum(plain, 40))
