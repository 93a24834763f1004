"""The code of docs/howto/write-a-pass.md does what the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from onnxprune.graph.weights import constant_array

PAGE = Path(__file__).resolve().parents[3] / "docs" / "howto" / "write-a-pass.md"


@pytest.fixture
def page_code(monkeypatch):
    """The page's first three blocks (configuration, plan, pass) as a module."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    module = types.ModuleType("acme_passes")
    monkeypatch.setitem(sys.modules, "acme_passes", module)
    exec("\n".join(blocks[:3]), module.__dict__)
    return module


def test_the_pass_of_the_page_works_and_its_second_run_changes_nothing(make_model, run_verified, page_code):
    weight = np.array([[1.0, 1e-8], [-1e-9, -2.0]], np.float32)
    model = make_model("g (float[1,2] x) => (float[1,2] y) { y = MatMul(x, w) }", {"w": weight})
    pass_ = page_code.DropTinyPass(page_code.DropTinyConfig(limit=1e-6))
    first = run_verified(pass_, model)
    assert constant_array(first.state.model.graph.initializers["w"]).tolist() == [[1, 0], [0, -2]]
    assert first.report.changes[0].figures == {"count": 2}
    assert run_verified(pass_, first.state.model).state.model is first.state.model
