"""The CoRe study: what the papers claim of the heads that fetch visual evidence, tested on a model
of yours.

The claims are those of arXiv 2606.05843 (functional sparsity in cross-modal retrieval) and arXiv
2506.05344 (SparseMM). Each is a finding, F1 to F8, a frozen dataclass in a file of its own: the
claim, the criterion it is judged by, what is measured, and `conclude(numbers) → Verdict`. All
thresholds stand in `criteria`. The page is drawn from report.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corelens.inputs.sample import Sample

if TYPE_CHECKING:
    from corelens.findings.options import Options
    from corelens.findings.result import Study
    from corelens.model.hooked import HookedMLLM

__all__ = ["study"]


def study(
    model: "HookedMLLM | Mapping[str, HookedMLLM]",
    samples: Mapping[str, Sequence[Sample]] | Sequence[Sample],
    out: str | Path | None = "report",
    options: "Options | None" = None,
    findings: Sequence[str] | None = None,
    resume: bool = True,
    command: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> "Study":
    """Test every finding on every model and world, as one report.

    Heads are scored on the first part of each world's samples and tested on the rest. A finding
    that a model or a world cannot be judged by is said to be so, with the reason; one whose test
    has too few samples is not judged.

    Args:
        model: a HookedMLLM, or {name: HookedMLLM} for several.
        samples: {world: samples with regions and answers}, or one list; 10 or more each. A
            published table needs 100 scored and 200 tested. A sample whose meta has "serves"
            (["F8"], say) is used for these findings only.
        out: the folder for report.html and report.json; None writes and draws nothing.
        options: how thorough, see `corelens.findings.options.Options`; single settings may be given
            by name instead (`draws=20`, `seed=1`).
        findings: only these, "F1" to "F8"; all by default.
        resume: keep what is finished in `out`/work, so that a study that was stopped goes on when
            it is called again with the same models, samples and options; False starts anew and
            keeps the report alone.
        command: the command that makes this report again, shown in it.
        progress: print a line a finding.

    Returns:
        A Study; `study.findings` are the verdicts, `study.report` the page.
    """
    from corelens.findings.options import Options
    from corelens.findings.run import run_study

    models = model if isinstance(model, Mapping) else {model_name(model): model}
    worlds = samples if isinstance(samples, Mapping) else {"samples": samples}
    options = options or Options(**settings)
    return run_study(
        models,
        worlds,
        None if out is None else Path(out),
        options,
        findings,
        resume,
        command,
        progress,
    )


def model_name(model: "HookedMLLM") -> str:
    """What a model is called: the last part of where it came from, else its family."""
    from corelens.hf import source_of  # (it needs torch)

    return Path(source_of(model.hf.config)).name or str(model.cfg.family or "model")
