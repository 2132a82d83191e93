"""model.verify and `corelens doctor`: every identity holds on every family, and made faults are
found and refused."""

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

from corelens.cli import app as cli
from corelens.errors import CorelensError
from corelens.hooks import attention_function
from corelens.model import module_hooks, wiring
from corelens.model.hooked import HookedMLLM
from helpers.families import FAMILIES, tiny
from helpers.text_models import text, text_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_identity_holds_on_every_family(family):
    model = HookedMLLM(*tiny(family))
    result = model.verify()
    assert result.ok and not result.refused, str(result)
    assert [row.name for row in result.rows if row.passed is None] == []
    assert len(result.rows) == 10 and all(row.error <= row.allowed for row in result.rows)


def test_without_a_processor_inputs_are_needed():
    model = text_model()
    with pytest.raises(CorelensError, match="inputs to run it on"):
        model.verify()
    result = model.verify(text())
    assert result.ok
    assert (
        sorted(row.note for row in result.rows if row.passed is None) == ["needs the processor"] * 2
    )


def test_forms():
    result = text_model().verify(text())
    as_dict = json.loads(json.dumps(result.to_dict()))
    assert as_dict["ok"] is True and as_dict["refused"] == []
    assert {"identity", "error", "allowed", "passed", "note", "refused"} == set(as_dict["rows"][0])
    assert "pass" in str(result) and "<table>" in result._repr_html_() and "FAIL" not in str(result)


def at_fault(monkeypatch, kind):
    """One layer computes something else at one point."""
    if kind == "z":
        hooked = attention_function._hooked

        def shifted(inputs, points, run, step):
            z = hooked(inputs, points, run, step)
            return z + 0.1 if inputs.call.module.layer_idx == 2 else z

        monkeypatch.setattr(attention_function, "_hooked", shifted)
    if kind == "pattern":
        softmax = attention_function.softmax
        monkeypatch.setattr(
            attention_function, "softmax", lambda scores, sinks: softmax(scores * 1.01, sinks)
        )
    if kind == "result":
        results = module_hooks.head_results
        monkeypatch.setattr(module_hooks, "head_results", lambda *args: results(*args) * 1.01)


@pytest.mark.parametrize(
    ("kind", "identity", "refused", "still"),
    [
        (
            "z",
            "hooks that change nothing = no hooks",
            "blocks.2.attn.hook_z",
            "blocks.1.attn.hook_z",
        ),
        (
            "pattern",
            "hook_pattern = eager's attention weights",
            "blocks.0.attn.hook_pattern",
            "blocks.0.attn.hook_z",
        ),
        (
            "result",
            "sum of hook_result + bias = output of o_proj",
            "blocks.3.attn.hook_result",
            "blocks.3.attn.hook_z",
        ),
    ],
)
def test_points_whose_identity_does_not_hold_are_refused(
    monkeypatch, kind, identity, refused, still
):
    model = text_model(check=False)
    at_fault(monkeypatch, kind)
    result = model.verify(text())
    row = next(row for row in result.rows if row.name == identity)
    assert row.passed is False and refused in row.failed and not result.ok and "FAIL" in str(result)
    monkeypatch.undo()
    assert refused in result.refused and refused in result.to_dict()["refused"]
    with pytest.raises(CorelensError, match="does not hold"):
        model.run_with_hooks(text(), fwd_hooks=[(refused, lambda x, hook: None)])
    with pytest.raises(CorelensError, match="does not hold"):
        model.run_with_cache(text(), names_filter=refused.replace("attn.", "attn.head.0."))
    model.run_with_cache(text(), names_filter=still)


def test_a_residual_stream_that_does_not_add_up_names_its_points():
    model = text_model()
    layer = model.hf.model.layers[1]
    # after what hook_mlp_out sees
    layer.mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    result = model.verify(text())
    assert result.refused == ("blocks.1.hook_mlp_out",)
    assert "blocks.0.hook_mlp_out" in model.hook_dict


def test_what_a_run_leaves_behind_is_seen(monkeypatch):
    model, generation = text_model(), wiring.on_logits

    def leaves_a_hook(run, point):
        model.hf.model.norm.register_forward_hook(lambda *_: None)
        return generation(run, point)

    monkeypatch.setattr(wiring, "on_logits", leaves_a_hook)
    result = model.verify(text())
    assert [row.name for row in result.rows if row.passed is False] == [
        "afterwards nothing is left"
    ]


def test_hooks_that_hang_on_the_model_are_neither_run_nor_lost():
    model, seen = text_model(), []
    model.add_hook("blocks.0.attn.hook_z", lambda z, hook: seen.append(1))
    assert model.verify(text()).ok and not seen
    model(text())
    assert seen == [1]


# --- the command line


def test_doctor_measures_a_bundled_model():
    with warnings.catch_warnings():
        # what doctor draws is not the user's
        warnings.filterwarnings("error", message=".*only knows drawn scenes")
        done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["ok"] and len(report["rows"]) == 10
    environment = report["environment"]
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert {"tested", "outside", "device", "kernels"} <= set(environment)


def test_doctor_shows_a_table():
    done = CliRunner().invoke(cli.app, ["doctor", "qwen3vl-s"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert (
        "transformers" in done.stdout
        and "residual stream" in done.stdout
        and "FAIL" not in done.stdout
    )


def test_doctor_exits_with_1_if_an_identity_fails(monkeypatch):
    at_fault(monkeypatch, "result")
    done = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert done.exit_code == 1 and json.loads(done.stdout)["ok"] is False


def test_doctor_on_a_folder_without_a_processor(tmp_path):
    hf, _ = tiny("llava")
    hf.save_pretrained(tmp_path)
    with pytest.raises(CorelensError, match="no processor"):
        CliRunner().invoke(cli.app, ["doctor", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(CorelensError, match="processor"):
        HookedMLLM.from_pretrained(tmp_path)
    with pytest.raises(CorelensError, match=r"config\.json"):
        CliRunner().invoke(cli.app, ["doctor", str(tmp_path / "..")], catch_exceptions=False)
