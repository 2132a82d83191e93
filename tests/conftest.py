"""Shapes in signatures are checked at run time whenever the tests run."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("MKL_CBWR", "AUTO")  # on every CPU the same product has the same bits, wherever it lies in memory

install_import_hook("corelens", "typecheck.checker").__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
