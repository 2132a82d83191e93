"""Types of transformers that no other test names: what CoreLens says of each is the plain model's,
or refused. `python benchmarks/families.py` does this for all of them."""

import json
import re
from pathlib import Path

import pytest
import transformers

from families import checks, shrink

# what is added times a number; experts and latent attention; another norm's name; a gate and linear
# attention; two norms a sublayer
SAMPLE = ("granite_docling", "kimi_k25", "fuyu", "minicpmv4_6", "glm4v")
REFUSED = {
    "t5gemma2": "encoder-decoder",
    "qwen2_5_omni": r"hf\.thinker",
    "qwen4_exp": "4 residual streams",
}
RESULTS = Path(__file__).parents[1] / "benchmarks/results/families.json"


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_is_served_exactly(model_type):
    row = checks.row_of(model_type)
    assert checks.verdict(row) == "served", row
    assert {row[name] for name in ("unhooked", "no_op", "written_z", "generated", "untouched")} == {
        checks.EXACT
    }, row
    assert row["residual"] == checks.EXACT, row


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_type_that_is_not_served_says_what_to_do(model_type):
    row = checks.row_of(model_type)
    assert checks.verdict(row) == "refused"
    assert re.search(REFUSED[model_type], row["refused"]), row


def test_a_wrong_number_would_be_called_wrong():
    row = dict.fromkeys(checks.CHECKS, checks.EXACT)
    assert checks.verdict(row) == "served"
    assert checks.verdict(row | {"pattern": "off by 1.0e-02"}) == "silently wrong"
    assert checks.verdict(row | {"residual": "raised: KeyError"}) == "broken"


def test_every_type_has_a_row_and_none_is_silently_wrong():
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    if measured["versions"]["transformers"] == transformers.__version__:
        assert set(measured["types"]) == set(shrink.TYPES)
    assert not [n for n, row in measured["types"].items() if row["verdict"] == "silently wrong"]
