"""LiteRT's log stays off stderr, and nothing else gets lost there."""

from __future__ import annotations

import os
import sys

import pytest

from onnxprune.runtime.native_log import without_native_log


def test_log_lines_are_dropped_and_the_rest_is_printed_after_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    with without_native_log():
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
        os.write(2, b"something else\n")
        os.write(2, b"ERROR: tflite/kernels/x.cc:3 a != b\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "something else\n"


def test_what_python_printed_before_stays_before(capfd: pytest.CaptureFixture[str]) -> None:
    sys.stderr.write("before, ")
    with without_native_log():
        os.write(2, b"INFO: noise\n")
    sys.stderr.write("after")
    sys.stderr.flush()
    assert capfd.readouterr().err == "before, after"


def test_stderr_is_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), without_native_log():
        raise KeyError
    os.write(2, b"INFO: seen\n")
    assert capfd.readouterr().err == "INFO: seen\n"
