"""Fixtures for converters: frameworks that are imported once, and a way to convert without a child process.

A child that imports PyTorch or TensorFlow takes three to eight seconds. So most tests run the same code in this
process (`convert_here`), and a few, named so, go through the real child.
"""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert.tensorflow_graph import import_tensorflow

NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
            self.head = nn.Linear(width, 5)

        def forward(self, image):
            return self.head(self.backbone(image).mean((2, 3)))

    def make():
        torch.manual_seed(0)
        return Net()

    def make_with_inputs():
        return make(), torch.ones(1, 3, 12, 12)
"""


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch, imported once; its own deprecations are not ours."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch: pip install 'onnxprune[torch]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch

        importlib.import_module("torch.onnx")
        importlib.import_module("torch.export")
    return torch


@pytest.fixture(scope="session")
def tf() -> Any:
    """TensorFlow, imported once, as the converters import it."""
    for package in ("tensorflow", "tf2onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'onnxprune[tensorflow]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_tensorflow()


@pytest.fixture
def convert_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run converters in this process: the same functions with the same arguments, minus the child."""

    def run_here(function: str, arguments: Mapping[str, Any], *, folder: Path, **_limits: object) -> None:
        module, _, name = function.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(importlib.import_module(module), name)(dict(arguments), folder)

    monkeypatch.setattr("onnxprune.convert.source.run_converter", run_here)


@pytest.fixture
def write_module(tmp_path: Path) -> Callable[[str], Path]:
    """Write Python source to a file of its own."""

    def write(source: str = NET, name: str = "net.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return path

    return write
