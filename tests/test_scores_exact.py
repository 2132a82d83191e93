"""Every metric of `score_heads` against a slow, independent one from `output_attentions=True`
(eager attention).

Three families, images and videos, one sample a batch and two of different lengths. The slow side
runs each sample alone, holds whole attention matrices, and follows the formulas of the papers in
loops; it shares no code with `corelens.metrics`. Below: identities that need no second
implementation.
"""

import copy
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.metrics import metric
from helpers.families import tiny
from helpers.samples import picture

FAMILIES = ["qwen3_vl", "llava_onevision", "internvl"]
NEW = 5  # tokens that are written for the metrics that watch the model write
CASES = pytest.mark.parametrize(
    ("family", "kind"), [(f, k) for f in FAMILIES for k in ("images", "video")]
)


@cache
def hooked(family: str) -> cl.HookedMLLM:
    model, processor = tiny(family)
    hooked = cl.HookedMLLM(copy.deepcopy(model), processor)
    # a random model would write image tokens
    hooked.hf.generation_config.suppress_tokens = list(hooked.layout.placeholders(model.config))
    return hooked


@cache
def eager(family: str):
    hf = copy.deepcopy(tiny(family)[0])
    hf.set_attn_implementation("eager")
    return hf


def bare(kind: str) -> list[cl.Sample]:
    """Two samples of different lengths, each with two regions, without texts."""
    if kind == "images":
        sample_ = cl.Sample(
            [picture(0)],
            "What digit is on the red circle?",
            "7",
            [cl.Box(0, 0, 40, 64), cl.Box(50, 0, 96, 30)],
        )
        pages = [picture(1, (128, 96)), picture(2, (64, 64))]
        two = cl.Sample(
            pages, "Which colour?", "2 b", [cl.Box(0, 0, 128, 40), cl.Box(30, 9, 64, 64, image=1)]
        )
        return [replace(sample_, id="one"), replace(two, id="two")]
    frames = [picture(i, (64, 64)) for i in range(8)]
    tubes = [
        cl.Tube({1: cl.Box(5, 5, 30, 30), 2: cl.Box(20, 20, 60, 60)}),
        cl.Tube({0: cl.Box(0, 0, 64, 30)}),
    ]
    sample_ = cl.Sample(
        question="When is the blue star first?",
        answer="2",
        video=frames[:4],
        regions=tubes[:1],
        id="v1",
    )
    two = cl.Sample(question="When?", answer="before", video=frames[2:6], regions=tubes, id="v2")
    return [sample_, two]


# --- the slow side


@torch.no_grad()
def attention(family: str, tensors: dict) -> tuple[np.ndarray, torch.Tensor]:
    """([layer, head, query, key], logits [pos, vocab]) of one sample alone."""
    out = eager(family)(**tensors, output_attentions=True, use_cache=False)
    return torch.stack([layer[0] for layer in out.attentions]).double().numpy(), out.logits[0]


@cache
def written(family: str, kind: str, number: int) -> tuple[list[int], np.ndarray]:
    """A greedy loop, one whole forward a token: the tokens, and [layer, head, step, key], the rows
    that predicted them."""
    tensors = dict(hooked(family).prepare(bare(kind)[number]).tensors)
    tokens, rows, length = [], [], tensors["input_ids"].shape[1]
    for _ in range(NEW):
        pattern, logits = attention(family, tensors)
        row = pattern[:, :, -1]
        rows.append(np.pad(row, ((0, 0), (0, 0), (0, length + NEW - row.shape[-1]))))
        logits[-1, hooked(family).hf.generation_config.suppress_tokens] = -torch.inf
        tokens.append(int(logits[-1].argmax()))
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor) and value.shape == (1, length + len(tokens) - 1):
                more = {"input_ids": tokens[-1], "attention_mask": 1}.get(name, 0)
                tensors[name] = torch.cat([value, value.new_full((1, 1), more)], dim=1)
    return tokens, np.stack(rows, axis=2)


@cache
def samples(family: str, kind: str) -> list[cl.Sample]:
    """`bare` with texts in the regions: parts of what the model will write, so that there is
    something to copy."""
    made = []
    for number, sample_ in enumerate(bare(kind)):
        pieces = [
            hooked(family).tokenizer.decode([token]) for token in written(family, kind, number)[0]
        ]
        texts = ["".join(pieces[:3]) + "#", "#" + "".join(pieces[2:])]
        regions = []
        for region, text in zip(sample_.regions, texts, strict=False):
            regions.append(replace(region, text=text))
        made.append(replace(sample_, regions=regions))
    return made


def union(tm) -> list[int]:
    return sorted({int(j) for region in tm.regions for j in region})


def row_numbers(tm, rows: str) -> list[int]:
    return {
        "question": tm.question,
        "last": tm.last,
        "answer": tm.answer - 1 if "answer" in tm.parts else None,
    }[rows].tolist()


def slow_masses(pattern, tm, rows: str, keys: list[int]) -> np.ndarray:
    """[layer, head, row]: the attention of these rows on these keys, summed one by one."""
    return np.stack(
        [sum(pattern[:, :, i, j] for j in keys) for i in row_numbers(tm, rows)], axis=-1
    )


@cache
def slow(family: str, kind: str) -> dict[str, np.ndarray]:
    """{key: [sample, layer, head]}, a ratio's numerator and denominator first: [2, sample, layer,
    head]."""
    model, expected = hooked(family), {}

    def add(key: str, value: np.ndarray) -> None:
        expected.setdefault(key, []).append(value)

    for number, sample_ in enumerate(samples(family, kind)):
        for answered in (False, True):
            inputs = model.prepare(sample_, answer=answered)
            tm = inputs.token_maps[0]
            pattern, _ = attention(family, inputs.tensors)
            for rows in ("answer",) if answered else ("question", "last"):
                mass = slow_masses(pattern, tm, rows, union(tm))
                add(f"ram {rows} max", mass.max(-1))
                add(f"ram {rows} mean", mass.mean(-1))
                seen = slow_masses(pattern, tm, rows, tm.visual.tolist())
                add(f"visual_mass {rows} max", seen.max(-1))
                add(f"visual_mass {rows} mean", seen.mean(-1))
                add(f"precision {rows}", np.stack([mass.mean(-1), seen.mean(-1)]))
                chance = seen * len(union(tm)) / len(tm.visual)
                add(f"lift {rows}", np.stack([mass.mean(-1), chance.mean(-1)]))
                add(f"ram_excess {rows} mean", (mass - chance).mean(-1))
                add(f"ram_excess {rows} max", (mass - chance).max(-1))
                add(f"ram_shifted {rows}", slow_shifted(pattern, tm, rows))
                for keys, of_keys in slow_keys(pattern, tm, rows).items():
                    add(f"ram {rows} {keys} mean", of_keys.mean(-1))
                    add(f"ram {rows} {keys} max", of_keys.max(-1))
            if not answered:
                asked, plain, plain_map = pattern, inputs, tm
        nothing = model.prepare(replace(sample_, question="N/A"))
        null, null_map = attention(family, nothing.tensors)[0], nothing.token_maps[0]
        calm = slow_masses(null, null_map, "question", union(null_map))
        add(
            "calibrated_ram",
            slow_masses(asked, plain_map, "question", union(plain_map)).mean(-1) - calm.mean(-1),
        )
        hard, calm_hard = (
            slow_keys(p, tm, "question")["max"].max(-1)
            for p, tm in ((asked, plain_map), (null, null_map))
        )
        add("calibrated_ram max", hard - calm_hard)
        add("qr", slow_qr(asked, plain_map, null, null_map))
        add("value_mass", slow_value_mass(family, plain, plain_map, asked))
        add("localization", slow_localization(asked, plain_map))
        tokens, rows_written = written(family, kind, number)
        steps = [
            "" if t in model.tokenizer.all_special_ids else model.tokenizer.decode([t])
            for t in tokens
        ]
        texts = [region.text for region in sample_.regions]
        add("retrieval", slow_copies(rows_written, plain_map, steps, texts, slow_retrieval))
        add("visual_head", slow_copies(rows_written, plain_map, steps, texts, slow_visual_head)[0])
    stacked = {key: np.stack(values) for key, values in expected.items()}
    return {key: x.swapaxes(0, 1) if x.ndim == 4 else x for key, x in stacked.items()}


def slow_keys(pattern, tm, rows: str) -> dict[str, np.ndarray]:
    """{reduction over keys: [layer, head, row]}, row by row and key by key."""
    region, numbers = union(tm), row_numbers(tm, rows)
    expected = {
        keys: np.zeros((*pattern.shape[:2], len(numbers))) for keys in ("mean", "max", "hit")
    }
    for index in np.ndindex(pattern.shape[:2]):
        for number, i in enumerate(numbers):
            row = pattern[index][i]
            expected["mean"][(*index, number)] = sum(row[j] for j in region) / len(region)
            expected["max"][(*index, number)] = max(row[j] for j in region)
            expected["hit"][(*index, number)] = max(range(len(row)), key=lambda j: row[j]) in region
    return expected


def slow_shifted(pattern, tm, rows: str) -> np.ndarray:
    """The mean RAM of every shift of the region within its picture that touches the region
    least."""
    total = np.zeros(pattern.shape[:2])
    for positions in (image.tolist() for image in tm.images):
        inside = [positions.index(j) for j in union(tm) if j in positions]
        if not inside:
            continue
        shifts = [
            [positions[(i + by) % len(positions)] for i in inside] for by in range(len(positions))
        ]
        touching = [len(set(shift) & set(union(tm))) for shift in shifts]
        places = [shift for shift, n in zip(shifts, touching, strict=True) if n == min(touching)]
        total += sum(slow_masses(pattern, tm, rows, place).mean(-1) for place in places) / len(
            places
        )
    return total


def slow_qr(pattern, tm, null, null_map) -> np.ndarray:
    score = np.zeros(pattern.shape[:2])
    for region, null_region in zip(tm.regions, null_map.regions, strict=True):
        for index in np.ndindex(score.shape):
            s = [
                np.mean([pattern[index][i, j] for i in tm.question])
                - np.mean([null[index][i, k] for i in null_map.question])
                for j, k in zip(region, null_region, strict=True)
            ]
            inliers = [x for x in s if len(s) == 1 or x > np.mean(s) - 2 * np.std(s, ddof=1)]
            score[index] += sum(inliers)
    return score


@torch.no_grad()
def slow_value_mass(family: str, inputs, tm, pattern) -> np.ndarray:
    """The norm of every vector A_ij v_j W_O, with v as the projection of each layer gives it."""
    hf, values = eager(family), []
    layers = hooked(family).layout.decoder(hf).layers
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0]))
        for layer in layers
    ]
    hf(**inputs.tensors, use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = np.zeros(pattern.shape[:2])
    for number, layer in enumerate(layers):
        d, group = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
        for head in range(pattern.shape[1]):
            v = values[number][:, head // group * d : (head // group + 1) * d].double()
            written_there = (
                v @ layer.self_attn.o_proj.weight[:, head * d : (head + 1) * d].double().T
            ).numpy()
            norms = [
                sum(
                    np.linalg.norm(pattern[number, head, i, j] * written_there[j])
                    for j in union(tm)
                )
                for i in tm.question
            ]
            expected[number, head] = np.mean(norms)
    return expected


def slow_localization(pattern, tm) -> np.ndarray:
    """(mass on the picture, spatial entropy) [2, layer, head], by flooding from token to token
    through their cells."""
    visual = tm.visual.tolist()
    cells = [tm.cell(j) for j in visual]
    real = [c for c in cells if c[3] > c[1]]
    slack = 0.01 * min(min(c[3] - c[1], c[4] - c[2]) for c in real)

    def apart(a, b) -> float:
        return max(max(a[k], b[k]) - min(a[k + 2], b[k + 2]) for k in (1, 2))

    # tiles, thumbnail …: the cells of one view do not overlap; each frame and picture is another
    views = [[]]
    for i, cell in enumerate(cells):
        others = [cells[k] for k in views[-1] if cells[k] in real and cell in real]
        if any(cell[0] != b[0] or apart(cell, b) < -slack for b in others):
            views.append([])
        views[-1].append(i)
    view_of = {i: number for number, of in enumerate(views) for i in of}
    neighbours = {
        i: [
            k
            for k, b in enumerate(cells)
            if a in real and b in real and view_of[i] == view_of[k] and apart(a, b) <= slack
        ]
        for i, a in enumerate(cells)
    }
    bottom = []
    for first in {c[0] for c in cells}:
        of = max((v for v in views if cells[v[0]][0] == first), key=len)  # the finest
        lowest = max(cells[i][4] for i in of if cells[i] in real)
        bottom += [i for i in of if cells[i] in real and cells[i][4] >= lowest - slack]
    expected = np.zeros((2, *pattern.shape[:2]))
    for index in np.ndindex(pattern.shape[:2]):
        look = pattern[index][int(tm.last), visual]
        above = np.clip(look - look.mean(), 0, None)
        lit = {i for i in range(len(look)) if above[i] > 0.001}
        expected[0][index] = look.sum()
        if not lit or lit >= set(bottom):
            expected[1][index] = np.log(len(look)) + 1
            continue
        while lit:
            place, edge = 0.0, [lit.pop()]
            while edge:
                i = edge.pop()
                place += above[i]
                more = [k for k in neighbours[i] if k in lit]
                lit.difference_update(more)
                edge += more
            expected[1][index] -= place / above.sum() * np.log(place / above.sum())
    return expected


def slow_votes(parts) -> np.ndarray:
    """Ten votes a sample for the lowest entropies among the heads at or above the elbow of the
    sorted mean masses."""
    mass, entropy = parts
    curve = sorted(mass.mean(0).ravel())
    n = len(curve)
    drops = [
        abs(y - (curve[0] + (curve[-1] - curve[0]) * i / (n - 1))) for i, y in enumerate(curve)
    ]
    looking = [
        index
        for index in np.ndindex(mass.shape[1:])
        if mass.mean(0)[index] >= curve[int(np.argmax(drops))] - 1e-9
    ]
    expected = np.zeros(mass.shape)
    for votes, of in zip(expected, entropy, strict=True):
        for index in sorted(looking, key=lambda index: of[index])[:10]:
            votes[index] = 1
    return expected


def slow_copies(rows, tm, steps, texts, rule) -> np.ndarray:
    """[2, layer, head]: `rule` says of each step and head what it adds to numerator and
    denominator."""
    expected = np.zeros((2, *rows.shape[:2]))
    for index in np.ndindex(rows.shape[:2]):
        for step, text in enumerate(steps):
            inside = [
                r
                for r, region_text in enumerate(texts)
                if text.strip() and text.strip() in region_text
            ]
            expected[(slice(None), *index)] += rule(
                int(rows[index][step].argmax()), inside, [r.tolist() for r in tm.regions]
            )
    return expected


def slow_retrieval(key: int, inside: list[int], regions: list[list[int]]) -> tuple[float, float]:
    return float(any(key in regions[r] for r in inside)), float(bool(inside))


def slow_visual_head(key: int, inside: list[int], regions: list[list[int]]) -> tuple[float, float]:
    return (
        1 / len(regions[inside[0]]) if len(inside) == 1 and key in regions[inside[0]] else 0.0
    ), 0.0


# --- the comparison


def with_rows(name: str, rows: str, reduce: str = "") -> str:
    default = {"reduce": "mean", "rows": "question"}
    options = [f"{k}={v}" for k, v in (("rows", rows), ("reduce", reduce)) if v and v != default[k]]
    return name + (f"[{','.join(options)}]" if options else "")


KEYS = {
    f"{name} {rows} {reduce}": with_rows(name, rows, reduce)
    for name in ("ram", "visual_mass", "ram_excess")
    for rows in ("question", "last", "answer")
    for reduce in ("max", "mean")
}
KEYS |= {
    f"ram_shifted {rows}": with_rows("ram_shifted", rows) for rows in ("question", "last", "answer")
}
DESIGN_SPACE = {
    f"ram {rows} {keys} {reduce}": metric("ram", rows=rows, keys=keys, reduce=reduce)
    for rows in ("question", "last", "answer")
    for keys in ("mean", "max", "hit")
    for reduce in ("mean", "max")
}
DESIGN_SPACE["calibrated_ram max"] = metric("calibrated_ram", keys="max", reduce="max")
RATIOS = {
    f"{name} {rows}": with_rows(name, rows)
    for name in ("precision", "lift")
    for rows in ("question", "last", "answer")
}
PLAIN = {name: name for name in ("calibrated_ram", "qr", "value_mass")}


@CASES
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_metric_is_the_number_from_output_attentions(family, kind, batch_size):
    wanted = slow(family, kind)
    names = [
        *KEYS.values(),
        *RATIOS.values(),
        *PLAIN,
        "gaze",
        "localization",
        "retrieval",
        "visual_head",
    ]
    names += DESIGN_SPACE.values()
    scores = cl.score_heads(
        hooked(family), samples(family, kind), names, batch_size=batch_size, max_new_tokens=NEW
    )
    close = {"atol": 1e-6, "rtol": 0}
    designs = {slowly: m.key for slowly, m in DESIGN_SPACE.items()}
    for slowly, key in {**KEYS, **PLAIN, **designs, "ram last max": "gaze"}.items():
        relative = (
            {"rtol": 1e-6} if key == "value_mass" else {}
        )  # the one that is no share of attention: norms exceed 1
        np.testing.assert_allclose(
            scores[key].per_sample, wanted[slowly], **close | relative, err_msg=key
        )
        np.testing.assert_allclose(
            scores[key].values, wanted[slowly].mean(0), **close | relative, err_msg=key
        )
    for slowly, key in RATIOS.items():
        above, below = wanted[slowly]
        np.testing.assert_allclose(scores[key].parts, wanted[slowly], **close, err_msg=key)
        np.testing.assert_allclose(
            scores[key].values, above.sum(0) / below.sum(0), atol=1e-6, rtol=1e-6, err_msg=key
        )
    np.testing.assert_array_equal(
        scores["localization"].per_sample, slow_votes(wanted["localization"])
    )
    np.testing.assert_array_equal(scores["retrieval"].parts, wanted["retrieval"])
    head_sum = wanted["visual_head"].mean(0).sum()
    np.testing.assert_allclose(
        scores["visual_head"].per_sample, wanted["visual_head"] / head_sum, **close
    )


def test_the_cases_are_not_empty():
    """What is compared above varies: something is copied and hit, entropies differ, calibration and
    outliers matter."""
    for family in FAMILIES:
        for kind in ("images", "video"):
            expected = slow(family, kind)
            assert (
                expected["retrieval"][0].sum() > 0
                and (expected["retrieval"][0] < expected["retrieval"][1]).any()
            )
            assert expected["visual_head"].sum() > 0
            assert np.ptp(expected["localization"][1]) > 0.1
            assert np.abs(expected["calibrated_ram"] - expected["ram question mean"]).min() > 0
            assert 0 < expected["ram question hit mean"].mean() < 1
            assert np.abs(expected["ram question max"] - expected["ram question mean"]).max() > 1e-3


# --- identities


@pytest.mark.parametrize("family", FAMILIES)
def test_ram_over_all_keys_is_one_and_regions_add_up(family):
    def on_everything(pattern, token_map):
        return metric("ram")(
            pattern, replace(token_map, covered=[(token_map.all, torch.ones(len(token_map.all)))])
        )

    both = bare("images")
    both[0].regions = [cl.Box(0, 0, 20, 60), cl.Box(75, 0, 96, 60)]
    keys = ["ram", "ram[rows=last]", on_everything]
    whole = cl.score_heads(hooked(family), both, keys, batch_size=2)
    np.testing.assert_allclose(whole["on_everything"].per_sample, 1, atol=1e-6)
    parts = [
        cl.score_heads(hooked(family), [replace(s, regions=[s.regions[i]]) for s in both], keys[:2])
        for i in (0, 1)
    ]
    maps = hooked(family).prepare(both).token_maps
    # disjoint indeed
    assert all(not set(tm.regions[0].tolist()) & set(tm.regions[1].tolist()) for tm in maps)
    for key in keys[:2]:
        np.testing.assert_allclose(
            parts[0][key].values + parts[1][key].values, whole[key].values, atol=1e-6
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_head_has_ram_by_counting_and_lift_one(family):
    heads = [(0, 1), (2, 3)]
    keys = [
        "ram",
        "ram[reduce=max]",
        "ram_excess",
        "ram[rows=last]",
        "lift",
        "lift[rows=last]",
        "precision",
    ]
    both = bare("images")
    scores = cl.score_heads(
        hooked(family), both, keys, hooks=cl.ablate(heads, "uniform"), batch_size=2
    )
    for number, tm in enumerate(hooked(family).prepare(both).token_maps):
        count = {
            rows: [len(union(tm)) / int(tm.real[: i + 1].sum()) for i in row_numbers(tm, rows)]
            for rows in ("question", "last")
        }
        for layer, head in heads:
            own = {key: scores[key].per_sample[number, layer, head] for key in keys[:3]}
            assert own["ram"] == pytest.approx(np.mean(count["question"]), abs=1e-6)
            assert own["ram[reduce=max]"] == pytest.approx(max(count["question"]), abs=1e-6)
            assert own["ram_excess"] == pytest.approx(0, abs=1e-6)
            assert scores["ram[rows=last]"].per_sample[number, layer, head] == pytest.approx(
                count["last"][0], abs=1e-6
            )
            assert scores["lift"].per_sample[number, layer, head] == pytest.approx(1, abs=1e-5)
            assert scores["lift[rows=last]"].per_sample[number, layer, head] == pytest.approx(
                1, abs=1e-5
            )
            share = len(union(tm)) / len(tm.visual)
            assert scores["precision"].per_sample[number, layer, head] == pytest.approx(
                share, abs=1e-6
            )
    others = np.ones(scores["lift"].values.shape, dtype=bool)
    others[tuple(zip(*heads, strict=True))] = False
    assert np.abs(scores["lift"].values - 1)[others].min() > 1e-4  # no other head is uniform


# --- what a pass costs


def test_rows_are_not_kept_and_the_language_model_head_does_not_run(monkeypatch):
    model, alive, most = hooked("qwen3_vl"), [], [0]

    def watch(pattern, hook):
        most[0] = max(most[0], sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(pattern))

    def refused(*_):
        raise AssertionError("the language-model head ran")

    watch.rows = "question+last"
    handle = model.hf.lm_head.register_forward_pre_hook(refused)
    try:
        names = [
            "ram",
            "ram[rows=last]",
            "lift",
            "visual_mass",
            "calibrated_ram",
            "qr",
            "value_mass",
            "localization",
        ]
        watching = [(lambda name: name.endswith("hook_pattern_rows"), watch)]
        cl.score_heads(model, bare("images"), names, hooks=watching, batch_size=2)
    finally:
        handle.remove()
    # two forwards of four layers; no layer's rows outlive it
    assert len(alive) == 8 and most[0] == 0
