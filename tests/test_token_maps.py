"""The token map of a type that no other test names is right: painted cells move their own tokens,
and RAM and answers on it are plain transformers'. `python benchmarks/families.py --maps` does this
for all types."""

import json
from pathlib import Path

import pytest
import transformers

from families import maps, shrink

# tiles and a thumbnail; patches without a tower; a grid, and two kinds of token types; tokens that
# pool a few patches by attention; a model that computes all logits; newlines beside a grid's tokens
SAMPLE = ("cohere2_vision", "fuyu", "ernie4_5_vl_moe", "molmo2", "minicpm_ocr", "hunyuan_vl")
# in these towers neighbours overlap so far that a cell cannot be told from the next one's
BLURRED = {"unlimited_ocr"}
RESULTS = Path(__file__).parents[1] / "benchmarks/results/token_maps.json"


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_map_is_right_and_a_shifted_one_is_not(model_type):
    row = maps.map_of(model_type)
    cells = row["cells"]
    assert cells["right"] == cells["cells"] >= 5, row
    assert not cells["shifted_right"] and cells["shifted"] >= 5, row
    assert row["ram"] == row["answer"] == "exact", row


def test_a_picture_of_a_thousand_tokens_is_measured_in_a_few_calls():
    cost = maps.cost_of_probing()
    assert cost["tokens"] >= 1000 and cost["calls"] < 20, cost


def test_every_type_has_a_row_and_no_map_is_wrong():
    measured = json.loads(RESULTS.read_text(encoding="utf-8"))
    if measured["versions"]["transformers"] == transformers.__version__:
        assert set(measured["types"]) == set(shrink.TYPES)
    for name, row in measured["types"].items():
        if not row["token_map"].startswith("none") and name not in BLURRED:
            cells = row["cells"]
            # (a token that overlaps its neighbour, or pools over its border, may lose to it)
            assert cells["right"] >= 0.8 * cells["cells"] > 0, name
            assert 2 * cells["shifted_right"] <= cells["shifted"], name
            assert "off by" not in row["ram"] + row["answer"], name
