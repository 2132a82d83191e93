"""The report of a study: the verdicts first, then each finding, what the papers published, and how it was done."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from corelens.viz import page as p

if TYPE_CHECKING:
    from corelens.findings.finding import Finding
    from corelens.findings.result import Study

SIGNS = {"reproduced": ("yes", "✓"), "not reproduced": ("no", "✗"), "not judged": ("open", "–")}
METHODS = (
    "**RAM**(l, h) = mean over samples of max over rows i of Σ_{j∈G} A_ij, where A is the post-softmax attention of "
    "head h in layer l and G the visual tokens that the evidence's region touches. Raw mass, not normalised. The "
    "papers leave rows and reduction open, and the ranking moves with them, so three readings are kept apart: rows of "
    "the question (max or mean over them) and the last row, which predicts the first token of the answer.",
    "**Precision** is M_G/M_V, the share of the attention on the picture that lies on the evidence; **lift** divides "
    "it by |G|/|V|. Both are ratios of means over samples.",
    "**Ablations.** zero: the head's output z is set to 0. mean: to its mean over the scoring samples and all their "
    "positions. uniform: its rotated query is set to 0, so that it looks equally at all it may see. knockout: the "
    "edges from the question's, last and answer's rows to the region are removed before the softmax, and what is left "
    "is renormalised.",
    "**Controls.** bottom: as many heads of the lowest RAM. random: drawn outside every top set. layer-matched: drawn "
    "outside the top, as many in each layer. A drawn control's accuracy is averaged over its draws, sample by sample.",
    "**Accuracy** is greedy exact match: the gold answer and then the end. Intervals are 95% percentile bootstraps "
    "over samples; differences are paired by sample.",
)


def study_page(study: "Study") -> str:
    """The whole report as one offline HTML document."""
    models = list(study.meta["models"].values())
    names = list(dict.fromkeys(setting.model_name for setting in study.settings))
    shapes = ", ".join(f"{one['n_layers']} layers × {one['n_heads']} heads" for one in models)
    sections = [
        p.section("What was found", _opening(study), summary(study), *_left_out(study)),
        *([_beside(study.beside)] if study.beside else []),
        *(_finding(finding) for finding in study.findings),
        p.section("How it was done", *METHODS, _options(study), *_command(study)),
    ]
    return p.page(
        f"The heads that fetch the evidence: {', '.join(names)}",
        sections,
        _meta(study),
        subtitle=f"What the papers claim of retrieval heads in multimodal models, measured on {shapes}",
    )


def _opening(study: "Study") -> Markup:
    """The verdicts counted, and accuracy of each model on each world."""
    count = {verdict: sum(one.verdict == verdict for one in study.findings) for verdict in SIGNS}
    numbers = [(verdict, str(n), "of the claims") for verdict, n in count.items()]
    for setting in study.settings[:3]:
        if setting.lacks(("answers",)) is None:
            low, high = setting.clean.ci
            numbers.append(
                (f"clean accuracy, {setting.label}", f"{setting.clean.accuracy:.0%}", f"95% CI {low:.0%} to {high:.0%}")
            )
    return p.tiles(numbers)


def summary(study: "Study") -> Markup:
    """The table of findings: claimed, measured, verdict."""
    rows = Markup("").join(_row(finding) for finding in study.findings)
    return Markup(
        '<div class="scroll"><table class="claims"><thead><tr><th scope="col">finding</th><th scope="col">claimed</th>'
        '<th scope="col">measured here</th><th scope="col">verdict</th></tr></thead><tbody>{}</tbody></table></div>'
    ).format(rows)


def _row(finding: "Finding") -> Markup:
    return Markup('<tr><th scope="row"><a href="#{}">{} {}</a></th><td>{}</td><td>{}</td><td>{}</td></tr>').format(
        _anchor(finding), finding.id, finding.claim.title, finding.claim.claim,
        Markup("<br>").join(finding.measured) or "nothing", verdict(finding),
    )  # fmt: skip


def verdict(finding: "Finding") -> Markup:
    """The verdict as a badge: a sign and a word, so that its colour is not needed."""
    kind, sign = SIGNS[finding.verdict]
    scope = Markup('<span class="scope">{}</span>').format(finding.scope) if finding.scope else ""
    return Markup('<span class="verdict {}">{} {}</span>{}').format(kind, sign, finding.verdict, scope)


def _beside(rows: list[list[str]]) -> p.Section:
    return p.section(
        "Beside the papers",
        p.table(["what", "published", "here", "comparable?"], rows, "The papers' published figures beside these."),
    )


def _anchor(finding: "Finding") -> str:
    return p.section(_title(finding)).anchor


def _title(finding: "Finding") -> str:
    return f"{finding.id} {finding.claim.title}"


def _finding(finding: "Finding") -> p.Section:
    claim = finding.claim
    skipped = [p.note(*(f"Not measured on {label}: {why}." for label, why in finding.skipped.items()))]
    return p.section(
        _title(finding),
        Markup('<p class="judged">{}</p>').format(verdict(finding)),
        _terms(
            {
                "claimed": f"{claim.claim} ({claim.source})",
                "counts as reproduced if": claim.criterion,
                "measured here": finding.measured,
                "best explanation": finding.explanation,
            }
        ),
        *finding.parts,
        *(skipped if finding.skipped else []),
    )


def _terms(told: Mapping[str, str | Iterable[str]]) -> Markup:
    made = []
    for name, words in told.items():
        lines = [words] if isinstance(words, str) else list(words)
        if any(lines):
            said = Markup("<br>").join(lines)
            made.append(Markup("<dt>{}</dt><dd>{}</dd>").format(name, said))
    return Markup('<dl class="terms">{}</dl>').format(Markup("").join(made))


def _left_out(study: "Study") -> list[Markup]:
    said = []
    for world, wrong in study.unreadable.items():
        said.append(
            f"{len(wrong)} samples of {world} were left out because a picture cannot be read: {'; '.join(wrong)}."
        )
    for setting in study.settings:
        if setting.without_region and setting.samples[0].regions:
            said.append(f"{setting.without_region} samples of {setting.label} have no region and were left out.")
        if setting.lacks(("answers",)) is None and setting.lacks(("accuracy",)) is not None:
            said.append(
                f"**Ablation cannot be judged on {setting.label}**: {setting.lacks(('accuracy',))}. Nor is its "
                "attention retrieval: the numbers of F1 to F4 and F8 there mean nothing for the papers' claims."
            )
    return [p.note(*said)] if said else []


def _options(study: "Study") -> Markup:
    rows = [[name.replace("_", " "), _words(value)] for name, value in study.options.to_json().items()]
    rows += [[f"samples of {s.label}", f"{len(s.to_score)} scored, {len(s.to_test)} tested"] for s in study.settings]
    return p.table(["setting", "value"], rows, "What this study was run with.")


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _command(study: "Study") -> list[str]:
    return [f"Made by `{study.meta['command']}`."] if study.meta.get("command") else []


def _meta(study: "Study") -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, one in study.meta["models"].items():
        told[name] = f"{one['family']}, {one['dtype']}, weights {one['weight_hash']}"
    told["versions"] = ", ".join(f"{name} {number}" for name, number in study.meta["versions"].items())
    told |= {key: study.meta[key] for key in ("seed", "date", "command") if study.meta.get(key) not in (None, "")}
    return told
