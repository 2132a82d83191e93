"""Tables and sentences whose numbers are those of benchmarks/results; docs/_build/tables.py writes
them into pages."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import families_table
from markdown_tables import interval, markdown, paragraph

from corelens.demo import DEFAULT

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
HOOKED = {
    "CoreLens, no hook": "CoreLens, no hook",
    "CoreLens, z of all heads": "z of all heads",
    "CoreLens, 32 rows of all layers": "32 rows of all layers",
    "CoreLens, one pattern": "one pattern",
    "CoreLens, all patterns": "all patterns",
    "Hugging Face, eager": "no CoreLens, `eager` attention",
    "nnsight, z of all heads": "nnsight, z of all heads",
    "TransformerBridge, no hook": "TransformerBridge, no hook",
    "TransformerBridge, z of all heads": "TransformerBridge, z of all heads",
}

WAYS = [
    *("baseline", "hidden states", "residual hooks", "attentions"),
    *("pattern hooks", "residual patch", "head patch"),
]


def read(name: str) -> Any:
    """The JSON of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def hooks() -> str:
    """Time of a hooked forward over that of transformers' SDPA, by the prompt's length."""
    results = read("hooks-cpu")["results"]
    rows = [["", *(f"{int(length) // 1024}k tokens" for length in results)]]
    for key, words in HOOKED.items():
        rows.append(
            [words, *(f"{cell[key]['time_ratio']['median']:.2f}x" for cell in results.values())]
        )
    return markdown(rows)


def overhead() -> str:
    """Time of seven ways to look into a model, by tool, over that of a plain forward."""
    results = read("overhead-cpu")["results"]
    tools, conditions = (
        list(dict.fromkeys(key.split(", ")[part] for key in results)) for part in (0, 1)
    )
    rows = [["", *tools]]
    for condition in sorted(conditions, key=WAYS.index):
        ratios = [results.get(f"{tool}, {condition}", {}).get("ratio") for tool in tools]
        cells = [
            f"{x['median']:.2f} ({x['low']:.2f} to {x['high']:.2f})" if x else "–" for x in ratios
        ]
        rows.append([condition, *cells])
    return markdown(rows)


def scores() -> str:
    """Time and memory of scoring all heads over those of a plain forward."""
    rows = [["model", "tokens", "time", "memory", "`output_attentions`: time", "memory"]]
    runs = sorted(
        read("scores")["runs"].items(), key=lambda item: (item[0][:2] == "4b", item[1]["tokens"])
    )
    for _, run in runs:
        time, memory, peak = (
            run.get("time_ratio", {}),
            run.get("memory_ratio", {}),
            run["peak_bytes"],
        )
        cells = [f"{time['scores']['processor'][0]:.2f}x" if "scores" in time else "–"]
        cells += [
            f"{memory['scores']['above']:.2f}x"
            if memory
            else f"{peak['scores']['above'] / 1e9:.1f} GB"
        ]
        cells += [f"{time['eager']['processor'][0]:.1f}x" if "eager" in time else "–"]
        cells += [
            f"{memory['eager']['above']:.0f}x ({peak['eager']['above'] / 1e9:.1f} GB)"
            if "eager" in memory
            else "–"
        ]
        rows.append([run["shape"].split(" (")[0], f"{run['tokens']:,}", *cells])
    return markdown(rows)


def speed() -> str:
    """Patching against loops, sparse prefill and KV budgets against the dense run."""
    patching, (prefill,), decode = (
        read("patching"),
        read("prefill-cpu")["cells"],
        read("decode-cpu")["cells"],
    )
    rows = [["", "factor", "what counting operations or bytes allows"]]
    for sweep in patching["sweeps"]:
        words = (
            f"patching sweep over {sweep['sweep']}, {sweep['tokens']:,} tokens, against one "
            "forward a patch"
        )
        rows.append([words, f"{sweep['speed_up']:.1f}x faster", f"{sweep['allowed']:.1f}x"])
    cut = patching["knockout"]
    words = f"a knockout at {cut['tokens']:,} tokens, against a plain forward"
    rows.append([words, f"{cut['ratio']:.2f}x the time", ""])
    attention = prefill["attention"]
    words = (
        f"attention of a prompt of {prefill['tokens']:,} tokens at the Qwen3-VL-4B shape, "
        f"{prefill['full_heads']} of "
        f"{prefill['heads']} heads full, sink {prefill['sink']}, window {prefill['window']:,}, "
        "against the dense call"
    )
    laid_out = (
        f"{attention['speedup over laid out']['median']:.1f}x than a dense call on keys laid out "
        "for it"
    )
    rows.append(
        [
            words,
            f"{attention['speedup']['median']:.1f}x faster ({laid_out})",
            f"{attention['limit']:.1f}x",
        ]
    )
    for cell in read("prefill-decoder-cpu")["cells"]:
        words = (
            f"prefill of a whole decoder layer of that shape, {cell['tokens']:,} tokens, the same "
            "heads and pattern, against the dense layer"
        )
        gain = cell["decoder"]["speedup"]
        factor = f"{gain['median']:.2f}x faster ({gain['low']:.2f} to {gain['high']:.2f})"
        rows.append([words, factor, f"{cell['decoder']['limit']:.2f}x"])
    for cell in decode:
        memory = cell["kv_bytes"]["budget"] / cell["kv_bytes"]["dense"]
        words = (
            f"a decoded token at that shape (2 layers), {cell['tokens']:,} tokens × "
            f"{cell['batch']} samples"
        )
        words += f", KV budget {cell['budget']} a head"
        factor = f"{cell['eager']['speedup']:.2f}x faster, KV memory {memory:.1%}"
        rows.append([words, factor, f"{cell['limit_by_bytes']:.2f}x"])
    return markdown(rows)


def knockout() -> str:
    """Accuracy when heads no longer see the evidence, a column a model."""
    runs = read("knockout")["models"]
    columns = []
    for name, run in runs.items():
        draws = sorted(draw["accuracy"] for draw in run["random"])
        ends = ", ".join(f"{draws[i]:.3f}" for i in (0, len(draws) // 2, -1))
        size = f"{len(run['top']['ram']['heads'])} of {run['layers'] * run['heads']}"
        top = [interval(run["top"][key]) for key in ("ram", "ram[rows=last]")]
        columns.append([f"`{name}`", size, interval(run["clean"]), *top, ends, str(len(draws))])
    labels = [
        "heads that no longer see the evidence", "how many", "none",
        "top 5% by RAM as published (question rows)", "top 5% by RAM of the last row",
        "random: lowest, median, highest", "random sets",
    ]  # fmt: skip
    return markdown([[label, *cells] for label, *cells in zip(labels, *columns, strict=True)])


def knockout_worst() -> str:
    """What the random sets that cost most have in common, in the README's model."""
    run = read("knockout")["models"][DEFAULT]
    clean = run["clean"]["accuracy"]
    worst = [set(x["heads"]) for x in run["random"] if x["accuracy"] < clean - 0.1]
    others = [set(x["heads"]) for x in run["random"] if x["accuracy"] >= clean - 0.1]
    (head,) = set.intersection(*worst) - set.union(*others)
    text = f"{len(worst)} of the {len(run['random'])} random sets of `{DEFAULT}` cost more than 10 "
    text += f"points. They alone hold {head}, which RAM ranks behind the top "
    return paragraph(f"{text}{len(run['top']['ram']['heads'])}.")


def metrics() -> str:
    """Accuracy without the top heads by each score."""
    rows = [["score", "mean ablation", "knockout of the evidence"]]
    for key, line in read("metrics_compared")["scores"].items():
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(*line[kind]["accuracy"])
            for kind in ("mean", "knockout")
        ]
        rows.append([key if key == "random" else f"`{key}`", *cells])
    return markdown(rows)


def start() -> str:
    """Time until the command line has answered, where no model is needed."""
    rows = [["", "processor time", "range"]]
    for command, times in read("start")["commands"].items():
        low, high = times["range"]
        rows.append(
            [f"`{command}`", f"{times['processor_seconds']:.2f} s", f"{low:.2f} to {high:.2f} s"]
        )
    return markdown(rows)


def streaming() -> str:
    """Memory of the process by how many samples of a stream it has scored."""
    rows = [["samples scored", "resident memory", "time"]]
    for seen in read("streaming")["seen"]:
        cells = [f"{seen['samples']:,}", f"{seen['rss_mb']:.0f} MB", f"{seen['seconds']:.0f} s"]
        rows.append(cells)
    return markdown(rows)


def kills() -> str:
    """How many files differ after kills."""
    rows = [["", "kills", "files", "that differ"]]
    for run in read("kills"):
        counts = [run["kills"], run["files"], len(run["differ"])]
        rows.append([f"`{run['command']}`", *map(str, counts)])
    return markdown(rows)


def explorer() -> str:
    """Bytes of the explorer's page, time to its first paint, time of a click until the next
    frame."""
    clicks = ("token", "head", "patch")
    heads = ["", "patches", "heads", "page", "first paint", *(f"click on a {x}" for x in clicks)]
    rows = [heads]
    for case, run in sorted(read("explorer").items(), key=lambda item: item[1]["patches"]):
        cells = [str(run["patches"]), str(run["heads"]), f"{run['page_bytes'] / 1e6:.1f} MB"]
        cells += [f"{run['first_paint_ms'] / 1000:.1f} s"]
        for kind in clicks:
            times = run["clicks"][kind]
            cells.append(
                f"{times['median_ms']:.0f} ms [{times['low_ms']:.0f}, {times['high_ms']:.0f}]"
            )
        model = f"`{run['model']}`"
        rows.append([model if case == run["model"] else f"{case} ({model})", *cells])
    return markdown(rows)


def patterns() -> str:
    """Accuracy under each pattern, by the share of pairs it leaves and by what stays full."""
    run = read("patterns")
    full = {"none": "nothing", "heads": "top {} heads", "layers": "one layer"}
    full |= {"random heads": "{} random heads"}
    head = [words.format(run["full heads"]) for words in full.values()]
    table = [["pattern", "pairs seen", *(f"{words} full" for words in head)]]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in run["rows"]:
        mean = sum(row["accuracy"]) / len(row["accuracy"])
        cells.setdefault((row["pattern"], f"{row['left']:.2f}"), {})[row["full"]] = f"{mean:.3f}"
    for (pattern, left), accuracies in sorted(cells.items()):
        table.append([pattern, left, *(accuracies[name] for name in full)])
    return markdown(table)


def contrast() -> str:
    """Accuracy with five heads full and the others in a window, by which heads are full."""
    rows = [
        [
            "full heads",
            "`qwen3vl-s`, window 8",
            "`qwen3vl-s-long`, window 16",
            "the same, window 128",
        ]
    ]
    short, long = read("sparse_contrast")["pattern"], read("sparse_contrast_long")["pattern"]
    rows.append(
        [
            "all (dense)",
            *(f"{part['dense']['accuracy']['value']:.3f}" for part in (short, long, long)),
        ]
    )
    for name in (
        "top, RAM (last row)",
        "top, RAM (question rows)",
        "random",
        "bottom, RAM (last row)",
        "no full head",
    ):
        cells = [
            next(
                interval(point["accuracy"])
                for point in part["points"]
                if is_at(point, name, window)
            )
            for part, window in ((short, 8), (long, 16), (long, 128))
        ]
        rows.append([name, *cells])
    return markdown(rows)


def is_at(point: dict[str, Any], line: str, window: int) -> bool:
    """Whether a point of a contrast belongs to a line, at a share of 5% and a window."""
    return point["line"] == line and point["x"] == window and point["share"] in (None, 0.05)


def knockout_sentence() -> dict[str, str]:
    """What hiding the evidence from the README's model's top heads and from random ones leaves, as
    numbers in words."""
    run = read("knockout")["models"][DEFAULT]
    top = run["top"]["ram"]
    random = sorted(draw["accuracy"] for draw in run["random"])
    accuracies = {"clean": run["clean"]["accuracy"], "top": top["accuracy"]}
    accuracies |= {"low": random[0], "high": random[-1]}
    numbers = {"k": len(top["heads"]), "total": run["layers"] * run["heads"]}
    numbers |= {"draws": len(random), "scenes": run["answered"]}
    written = {name: f"{accuracy:.3f}" for name, accuracy in accuracies.items()}
    written["size"] = f"{run['parameters'] / 1e6:.1f}"
    return written | {name: str(number) for name, number in numbers.items()}


def masked_study() -> list[str]:
    """What masking whole heads of the README's model leaves, by the study: clean, top, bottom, how
    many random sets, their lowest and highest, scenes."""
    study = json.loads((RESULTS.parents[1] / "docs/study/report.json").read_text(encoding="utf-8"))
    part = study["models"][DEFAULT]["worlds"]["refer"]
    clean, necessity = part["clean"]["value"], part["numbers"]["F5"]
    random = [clean * (1 - lost) for lost in necessity["random"]["zero"]]
    role = [necessity["ram"][name]["zero"]["accuracy"] for name in ("top", "bottom")]
    low, high = f"{min(random):.3f}", f"{max(random):.3f}"
    written = [f"{accuracy:.3f}" for accuracy in (clean, *role)]
    return [*written, str(len(random)), low, high, str(part["tested"])]


def sentences() -> Iterable[tuple[str, str, list[str]]]:
    """(page, the sentence's words with {} for its numbers, the numbers)."""
    results = read("hooks-cpu")["results"]
    numbers = knockout_sentence()
    hidden = [numbers[name] for name in ("k", "total", "clean", "top")]
    random = [numbers[name] for name in ("k", "size", "low", "high", "draws", "scenes")]
    for page in ("README.md", "docs/index.md"):
        yield page, "hidden from the top {} of {} heads, accuracy falls from {} to {}", hidden
        yield (
            page,
            "Hidden from {} random others of the same bundled toy model ({}M parameters, drawn "
            "scenes), it stays between {} and {} ({} draws, {} scenes)",
            random,
        )
    last = read("knockout")["models"]["qwen3vl-s"]
    at_last_row = [f"{x['accuracy']:.3f}" for x in (last["clean"], last["top"]["ram"])]
    yield (
        "README.md",
        "hiding the evidence from the top heads by the published score changes nothing ({} to {})",
        at_last_row,
    )
    words = "the top 5% by RAM take it from {} to {}, the bottom 5% to {}, and {} random sets to "
    yield "README.md", words + "between {} and {} ({} scenes)", masked_study()
    words = "Of the {} multimodal types of transformers 5.24, {} run under hooks exactly as "
    words += "without, and {} are refused by name; {} have token maps"
    yield "README.md", words, families_table.counts()
    hooked = [
        results["8192"][key]["time_ratio"]["median"]
        for key in ("CoreLens, no hook", "CoreLens, z of all heads")
    ]
    words = "a run without hooks takes {} of transformers' own time, one that reads every head's "
    words += "output {}"
    yield "README.md", words, [f"{ratio:.2f}x" for ratio in hooked]
    scored = read("scores")["runs"]["4b 8192"]["time_ratio"]["scores"]["processor"][0]
    yield "README.md", "scoring all heads {} of a plain forward", [f"{scored:.2f}x"]
    (prefill,) = read("prefill-cpu")["cells"]
    speedup = f"{prefill['attention']['speedup']['median']:.1f}x"
    words = "{} faster attention on a prompt of 16k tokens when only {} of {} heads attend fully"
    yield "README.md", words, [speedup, str(prefill["full_heads"]), str(prefill["heads"])]
    layers = {cell["tokens"]: cell["decoder"] for cell in read("prefill-decoder-cpu")["cells"]}
    sizes = [f"{layers[n]['speedup']['median']:.2f}x" for n in (16384, 32768)]
    sizes += [f"{layers[n]['limit']:.2f}x" for n in (16384, 32768)]
    words = "whole layer {} at 16k and {} at 32k, where {} and {} are possible."
    yield "README.md", words, sizes
    all_patterns = results["4096"]["CoreLens, all patterns"]["time_ratio"]["median"]
    words = "all patterns cost {} times a plain forward"
    yield "docs/limits.md", words, [f"{all_patterns:.1f}"]
    yield "docs/benchmarks.md", "Dense accuracy is {}", [f"{read('patterns')['dense']:.3f}"]
    paths = read("core_paths")
    writers = [paths["writers"][f"blocks.0.attn.head.{head}.hook_z"] for head in (6, 4)]
    effects = [f"{-x:.1f}" for effect in writers for x in effect]
    words = "(L0H6 −{} [−{}, −{}], L0H4 −{} [−{}, −{}] of logit difference, {} pairs)"
    yield "docs/findings.md", words, [*effects, str(paths["pairs"])]
    logits = [f"{-x:.1f}" for x in paths["readers"]["hook_logits"]]
    later = max(abs(effect[0]) for name, effect in paths["readers"].items() if "blocks" in name)
    words = "what the five fetch goes to the logits (−{} [−{}, −{}]) with hardly a later head in "
    yield "docs/findings.md", words + "between (at most −{})", [*logits, f"{later:.2f}"]


TABLES = {
    table.__name__: table
    for table in [
        *(
            hooks,
            overhead,
            scores,
            speed,
            knockout,
            knockout_worst,
            metrics,
            contrast,
            start,
            kills,
        ),
        *(patterns, streaming, explorer),
    ]
}
