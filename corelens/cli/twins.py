"""What `corelens patch` patches: the twins of the samples, the axes to sweep, the metric, and one
result over all pairs."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from corelens.cli.opening import open_data
from corelens.cli.options import check_word
from corelens.errors import CorelensError, did_you_mean

TURN = 3  # how far a drawn world's twin counts the asked digit on
BLIND = ("blur", "mask", "noise")
AXES = ("layer", "head", "kv_head", "position", "role", "region")


def axes_of(site: str, per: str | None, n: int) -> tuple[str, ...]:
    """The axes to sweep; of several samples never positions, which mean another token in each."""
    from corelens.interventions.sites import ALIASES, SITES, WHOLE

    place = "position" if n == 1 else "role"
    if per is None:
        if ALIASES.get(site, site) in WHOLE:
            return (place,)
        extra = SITES[site][1] if site in SITES else None
        return "layer", extra if extra in ("head", "kv_head") else place
    axes = tuple(word.strip() for word in per.split(",") if word.strip())
    for axis in axes:
        check_word("--per", axis, AXES)
    if "position" in axes and n > 1:
        raise CorelensError(
            f"--per {per} on {n} samples, in each of which a position is another token",
            "one sample, or roles of tokens",
            "--n 1, or --per layer,role",
        )
    return axes


def check_site(site: str) -> None:
    """Raise for a site that does not exist, with the nearest ones."""
    from corelens.interventions.sites import ALIASES, SITES, WHOLE

    check_word("--site", ALIASES.get(site, site), [*SITES, *WHOLE])


def twin_data(twin: str | None, n: int, seed: int) -> Any:
    """The samples of a world or folder that holds the twins; None if the twins are made of the
    samples."""
    if twin is None or twin in (*BLIND, "replace"):
        return None
    from corelens.data.synthetic import worlds

    try:
        return open_data(twin, n, seed)[:n]
    except CorelensError as error:
        if not error.given.startswith("the data"):
            raise
        raise CorelensError(
            f"--twin {twin}: {error.given}",
            f"{', '.join((*BLIND, 'replace'))}, or {error.expected}",
            did_you_mean(twin, (*BLIND, "replace", *worlds()), error.do),
        ) from error


def twins_of(
    model: Any, samples: Any, twin: str | None, data: str, n: int, seed: int
) -> tuple[str, Any]:
    """What was done, and each sample's twin."""
    from corelens.data import load_data
    from corelens.data.public import split_options
    from corelens.data.synthetic import WORLDS
    from corelens.interventions.counterfactuals import counterfactual_pairs

    if twin is None:
        world, options = split_options(data)
        drawn = world in WORLDS and not Path(data).exists()
        if (
            drawn
            and "turn" in inspect.signature(WORLDS[world]).parameters
            and "turn" not in options
        ):
            turned = load_data(data, n, seed, turn=TURN)[: len(samples)]
            return f"{data}, turn={TURN}", [
                b for _, b in counterfactual_pairs(samples, turned, model=model)
            ]
        twin = "blur"
    if twin in BLIND:
        pairs = counterfactual_pairs(samples, twin, model=model)
    elif twin == "replace":
        others = [_next(samples, number) for number in range(len(samples))]
        pairs = counterfactual_pairs(samples, "replace", other=others, model=model)
    else:
        pairs = counterfactual_pairs(samples, twin_data(twin, n, seed)[: len(samples)], model=model)
    return twin, [b for _, b in pairs]


def _next(samples: Any, number: int) -> Any:
    """The next sample with another answer."""
    answer = samples[number].answer
    for other in [*samples[number + 1 :], *samples[:number]]:
        if other.answer != answer and other.regions:
            return other
    raise CorelensError(
        f"no sample whose answer differs from {answer!r}",
        "samples with several answers",
        "raise --n",
    )


def metric_of(samples: Any, twins: Any) -> str:
    """Logit difference if every twin has another answer; else the log-probability of the sample's
    own."""
    answers = [(sample.answer, twin.answer) for sample, twin in zip(samples, twins, strict=True)]
    return (
        "logit_diff"
        if all(None not in pair and pair[0] != pair[1] for pair in answers)
        else "answer_logprob"
    )


def patched(
    model: Any,
    samples: Any,
    twins: Any,
    axes: tuple[str, ...],
    metric: str,
    attribution: bool,
    batch_size: int,
    progress: bool,
    site: str,
    direction: str,
    run: Path | None = None,
) -> Any:
    """One PatchResult over all pairs; a batch of them at a time, for memory grows with it. With a
    folder `run`, what is finished is kept there."""
    import numpy as np

    from corelens.interventions import activation_patch, attribution_patch, metrics
    from corelens.interventions.result import PatchResult
    from corelens.interventions.resume import patched_in

    forced = metric in ("answer_logprob", "accuracy") and all(
        sample.answer is not None for sample in samples
    )
    if forced:  # the clean answer's tokens, of whatever number, behind both prompts
        twins = [
            replace(twin, answer=sample.answer) for sample, twin in zip(samples, twins, strict=True)
        ]
    options: dict[str, Any] = {
        "site": site,
        "per": axes,
        "direction": direction,
        "metric": getattr(metrics, metric)(),
    }
    if "role" in axes:
        options["positions"] = ["region", "visual", "question", "last"][
            not all(s.regions for s in samples) :
        ]

    def patch_batch(clean: Any, corrupted: Any) -> PatchResult:
        pair = [model.prepare(batch, answer=forced) for batch in (clean, corrupted)]
        if attribution:
            return attribution_patch(model, *pair, **options)
        return activation_patch(model, *pair, progress=progress and run is None, **options)

    if run is not None:
        decides = {**options, "attribution": attribution, "forced": forced}
        return patched_in(
            run, model, list(samples), twins, patch_batch, batch_size, (), decides, progress
        )
    results = [
        patch_batch(samples[start : start + batch_size], twins[start : start + batch_size])
        for start in range(0, len(samples), batch_size)
    ]
    values, base, other = (
        np.concatenate([getattr(result, name) for result in results])
        for name in ("values", "base", "other")
    )
    names = [name for result in results for name in result.samples]
    return PatchResult(values, base, other, results[0].axes, names, results[0].meta)
