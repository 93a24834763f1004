"""ONNX Runtime's exceptions as errors of ours: what failed, in one line, without its source paths."""

from __future__ import annotations

import re

from onnxprune.errors import ModelError

__all__ = ["load_error", "ort_exceptions", "run_error", "short_ort_message"]

MAX_MESSAGE_CHARACTERS = 400

# "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : ", and from 'session.run' "Error in execution: ".
_PREFIX = re.compile(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : |Error in execution: )")
# "/onnxruntime_src/onnxruntime/core/providers/cpu/math/matmul_helper.h:62 onnxruntime::...::Compute(...) "
_SOURCE_LINE = re.compile(r"\S*/onnxruntime/\S+\.(?:h|cc|cpp):\d+ (?:[^)]*\)(?: const)?(?: \[[^]]*\])? ?)?")
_MODEL_PATH = re.compile(r"Load model (?:from )?\S+ failed[:.] ?")

_LOAD_HINTS = (
    (
        re.compile(r"is not a registered function/op|No opset import for domain|Fatal error: \S*:\S*\("),
        "If the operator is a custom one, give its library with --custom-op-library.",
    ),
    (
        re.compile(r"IR version|official released onnx opset|opset \d+ is under development"),
        "The installed ONNX Runtime is older than the model: install a newer one, or export with an older opset.",
    ),
    (
        re.compile(r"Could not find an implementation|NOT_IMPLEMENTED"),
        "ONNX Runtime's CPU provider has no kernel for that operator and element type.",
    ),
    (
        re.compile(r"bad_alloc|Failed to allocate|out of memory", re.IGNORECASE),
        "The machine has too little free memory for this model.",
    ),
)


def ort_exceptions() -> tuple[type[Exception], ...]:
    """Everything that ONNX Runtime's Python layer raises; its own classes share no base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = tuple(
        found
        for found in vars(state).values()
        if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == state.__name__
    )
    return (*own, RuntimeError, ValueError, TypeError, MemoryError)


def short_ort_message(error: BaseException) -> str:
    """The heart of ONNX Runtime's message: one line, no error codes, no file names of its sources or of the model."""
    text = _PREFIX.sub("", str(error).strip()) or type(error).__name__
    text = _MODEL_PATH.sub("", _PREFIX.sub("", text))
    text = _SOURCE_LINE.sub("", text)
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 4] + " ..."


def load_error(error: BaseException, subject: str) -> ModelError:
    """The error for a session that can't be made; `subject` names the model ("'model.onnx'", "The model")."""
    text = str(error)
    hint = next((hint for pattern, hint in _LOAD_HINTS if pattern.search(text)), "")
    return ModelError(f"{subject} can't be loaded by ONNX Runtime: {_sentence(short_ort_message(error))}", hint)


def run_error(error: BaseException, subject: str) -> ModelError:
    """The error for a run that fails although the feeds have the declared names, types and shapes."""
    return ModelError(
        f"{subject} can't be run by ONNX Runtime: {_sentence(short_ort_message(error))}",
        "If the model has dynamic dimensions, the sizes fed may not be ones that it can take: fix them with --shape.",
    )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "...")) else f"{text}."
