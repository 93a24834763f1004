"""Converters in their own process: what crashes, hangs or hoards there is an error here, and nothing is left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from onnxprune.convert import source as source_module
from onnxprune.convert.source import SourceRequest, open_source
from onnxprune.errors import MissingExtraError, ModelError, OnnxPruneError, PluginError


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where job folders are made."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_factory_is_converted_in_the_child_and_nothing_is_left(
    torch: Any, write_module: Callable[..., Path], scratch: Path
) -> None:
    net = write_module()

    converted = open_source(SourceRequest(source=f"{net}:make_with_inputs"))

    assert converted.report.difference is not None
    assert converted.report.difference.max_rel < 1e-5
    assert set(converted.report.versions) == {"torch", "onnxscript", "onnx"}
    assert converted.report.duration_s > 0
    assert list(scratch.iterdir()) == []
    # The weights don't lie in the job folder, which is gone.
    assert all(v.const_value.numpy() is not None for v in converted.model.graph.initializers.values() if v.const_value)


def test_user_error_in_the_child_is_the_same_error_here(write_module: Callable[..., Path], scratch: Path) -> None:
    net = write_module("print('noise')\ndef make():\n    raise KeyError('width')\n")

    with pytest.raises(PluginError, match=r"net.py:3: KeyError: 'width'") as caught:
        open_source(SourceRequest(source=f"{net}:make"))

    assert caught.value.exit_code == 9
    assert list(scratch.iterdir()) == []


def test_crash_in_native_code_is_an_error(write_module: Callable[..., Path]) -> None:
    net = write_module("import os\nos.abort()\n")

    with pytest.raises(ModelError, match=r"Source 'net.py:make': the converter crashed in native code \(SIGABRT\)"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_file_that_hangs_is_stopped(write_module: Callable[..., Path], tmp_path: Path) -> None:
    net = write_module("import time\ntime.sleep(600)\n")

    with pytest.raises(ModelError, match="did not finish within 3 s and was stopped"):
        open_source(SourceRequest(source=f"{net}:make", timeout_s=3))


def test_file_that_hoards_memory_is_stopped_at_the_limit(write_module: Callable[..., Path]) -> None:
    net = write_module("hoard = bytearray(8 << 30)\n")

    with pytest.raises(OnnxPruneError, match="MemoryError"):
        open_source(SourceRequest(source=f"{net}:make", memory_limit_bytes=2 << 30))


def test_file_that_exits_is_an_error(write_module: Callable[..., Path]) -> None:
    net = write_module("import sys\nsys.exit(0)\n")

    with pytest.raises(PluginError, match="SystemExit"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_file_that_reads_stdin_gets_nothing_instead_of_hanging(write_module: Callable[..., Path]) -> None:
    net = write_module("width = input('width? ')\n")

    with pytest.raises(PluginError, match="EOFError"):
        open_source(SourceRequest(source=f"{net}:make"))


def test_missing_package_is_an_error_before_anything_starts(
    write_module: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_torch(packages: Sequence[str], *, needed_for: str) -> None:
        if "torch" in packages:
            raise MissingExtraError(package="torch", extra="torch", needed_for=needed_for)

    monkeypatch.setattr(source_module, "require_packages", without_torch)

    with pytest.raises(
        MissingExtraError, match=r"needs the package 'torch'.*pip install 'onnxprune\[torch\]'"
    ) as caught:
        open_source(SourceRequest(source=f"{write_module()}:make"))

    assert caught.value.exit_code == 4
