"""LiteRT's own profiler, which only its C interface reaches: the times of operators, inside XNNPACK as well.

The Python interpreter of ai-edge-litert has no profiler; `libLiteRt.so` of the same wheel has. What stands here about
its structures is true of ai-edge-litert 2.3 (litert/c/litert_profiler_event.h, litert_layout.h). An interface that has
changed can crash: these calls are made in a process of their own.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import JsonObject, JsonValue
from onnxprune.errors import ModelError

__all__ = ["FEEDS_FILE", "profile_in_this_process"]

FEEDS_FILE = "feeds.npz"
_LIBRARIES = ("libLiteRt.so", "libLiteRt.dylib", "libLiteRt.dll")
_ON_CPU = 1
_WRITE = 1
_LAYOUT_BYTES = 68  # rank and flags, 8 sizes, 8 strides
_MAX_KIND = 1 << 8

_Handle = ctypes.c_void_p
_Index = ctypes.c_size_t


class _Event(ctypes.Structure):
    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("duration_us", ctypes.c_uint64),
        ("memory", ctypes.c_size_t * 6),
        ("operator", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", ctypes.c_int),
    )


class _Library:
    """`libLiteRt` with its statuses as errors."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("ai_edge_litert")
        folders = [Path(place) for place in (found.submodule_search_locations or ())] if found is not None else []
        files = [folder / name for folder in folders for name in _LIBRARIES if (folder / name).is_file()]
        if not files:
            raise ModelError("The installed ai-edge-litert has no profiler: it lacks the library 'libLiteRt'.")
        self._library = ctypes.CDLL(str(files[0]))

    def call(self, function: str, *arguments: Any) -> None:
        status = self._function(function)(*arguments)
        if status != 0:
            raise ModelError(f"LiteRT's {function} failed with status {status}.")

    def made(self, function: str, *arguments: Any) -> Any:
        """The handle that `function` writes to its last argument."""
        handle = _Handle()
        self.call(function, *arguments, ctypes.byref(handle))
        return handle

    def number(self, function: str, *arguments: Any) -> int:
        value = _Index()
        self.call(function, *arguments, ctypes.byref(value))
        return value.value

    def _function(self, name: str) -> Any:
        try:
            return getattr(self._library, name)
        except AttributeError as error:
            raise ModelError(f"The installed ai-edge-litert has no profiler: it lacks the function {name}.") from error


def profile_in_this_process(arguments: JsonObject, folder: Path) -> JsonValue:
    """Run `path` and return the profiler's events of each counted run: [kind, tag, operator, microseconds].

    Args:
        arguments: `path`; `inputs`, their names; `threads`; `warmup` and `runs`.
        folder: Holds `FEEDS_FILE`: the inputs as they are stored, in the order of their names.
    """
    with np.load(folder / FEEDS_FILE) as stored:
        # Not under their names, which may be ones that `numpy.savez` has other uses for.
        arrays = [np.ascontiguousarray(stored[f"arr_{number}"]) for number in range(len(stored.files))]
    feeds = dict(zip(arguments["inputs"], arrays, strict=True))
    library = _Library()
    environment = library.made("LiteRtCreateEnvironment", 0, None)
    model = library.made("LiteRtCreateModelFromFile", environment, str(arguments["path"]).encode())
    kept: list[Any] = []
    options = _options(library, int(arguments["threads"]), kept)
    compiled = library.made("LiteRtCreateCompiledModel", environment, model, options)
    profiler = library.made("LiteRtCompiledModelGetProfiler", compiled)
    inputs, outputs = _buffers(library, environment, model, compiled, feeds)

    def run() -> None:
        library.call(
            "LiteRtRunCompiledModel",
            compiled,
            _Index(0),
            _Index(len(inputs)),
            inputs,
            _Index(len(outputs)),
            outputs,
        )

    for _ in range(arguments["warmup"]):
        run()
    runs = []
    for _ in range(arguments["runs"]):
        library.call("LiteRtResetProfiler", profiler)
        library.call("LiteRtStartProfiler", profiler)
        run()
        library.call("LiteRtStopProfiler", profiler)
        runs.append(_events(library, profiler))
    return runs


def _options(library: _Library, threads: int, kept: list[Any]) -> Any:
    """Options of a model with profiling on; what they point to is added to `kept`."""
    options = library.made("LiteRtCreateOptions")
    library.call("LiteRtSetOptionsHardwareAccelerators", options, _ON_CPU)
    leave = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)  # the text is Python's to free
    kept.append(leave)
    for identifier, text in (
        (b"runtime_options_string", b"enable_profiling = true\n"),
        (b"xnnpack", b"num_threads = %d\n" % threads),
    ):
        content = ctypes.create_string_buffer(text)
        kept.append(content)
        opaque = library.made("LiteRtCreateOpaqueOptions", identifier, content, leave)
        library.call("LiteRtAddOpaqueOptions", options, opaque)
    return options


def _buffers(
    library: _Library, environment: Any, model: Any, compiled: Any, feeds: Mapping[str, npt.NDArray[Any]]
) -> tuple[Any, Any]:
    signature = library.made("LiteRtGetModelSignature", model, _Index(0))
    num_inputs = library.number("LiteRtGetNumSignatureInputs", signature)
    num_outputs = library.number("LiteRtGetNumSignatureOutputs", signature)
    arrays = []
    for number in range(num_inputs):
        name = ctypes.c_char_p()
        library.call("LiteRtGetSignatureInputName", signature, _Index(number), ctypes.byref(name))
        text = (name.value or b"").decode("utf-8", "replace")
        if text not in feeds:
            raise ModelError(f"LiteRT's profiler runs another signature than the main one: it has an input '{text}'.")
        arrays.append(feeds[text])
        sizes = (ctypes.c_int * arrays[-1].ndim)(*arrays[-1].shape)
        library.call(
            "LiteRtCompiledModelResizeInputTensorNonStrict",
            compiled,
            _Index(0),
            _Index(number),
            sizes,
            _Index(arrays[-1].ndim),
        )
    layouts = (ctypes.c_char * (_LAYOUT_BYTES * max(1, num_outputs)))()
    library.call(
        "LiteRtGetCompiledModelOutputTensorLayouts",
        compiled,
        _Index(0),
        _Index(num_outputs),
        layouts,
        ctypes.c_bool(True),  # noqa: FBT003 - lay memory out anew
    )
    inputs = []
    for number, array in enumerate(arrays):
        layout = (ctypes.c_char * _LAYOUT_BYTES)()
        library.call("LiteRtGetCompiledModelInputTensorLayout", compiled, _Index(0), _Index(number), layout)
        buffer = _buffer(library, environment, compiled, signature, "Input", number, layout.raw)
        _fill(library, buffer, array)
        inputs.append(buffer)
    outputs = []
    for number in range(num_outputs):
        layout_bytes = layouts.raw[number * _LAYOUT_BYTES : (number + 1) * _LAYOUT_BYTES]
        outputs.append(_buffer(library, environment, compiled, signature, "Output", number, layout_bytes))
    return (_Handle * num_inputs)(*inputs), (_Handle * num_outputs)(*outputs)


def _buffer(
    library: _Library, environment: Any, compiled: Any, signature: Any, kind: str, number: int, layout: bytes
) -> Any:
    """Memory for one input or output of the sizes in `layout`."""
    tensor = library.made(f"LiteRtGetSignature{kind}TensorByIndex", signature, _Index(number))
    declared = ctypes.create_string_buffer(4 + _LAYOUT_BYTES)
    library.call("LiteRtGetRankedTensorType", tensor, declared)
    # The element type stands before the layout, of which the declared one may leave sizes open.
    actual = ctypes.create_string_buffer(declared.raw[:4] + layout)
    needs = library.made(f"LiteRtGetCompiledModel{kind}BufferRequirements", compiled, _Index(0), _Index(number))
    return library.made("LiteRtCreateManagedTensorBufferFromRequirements", environment, actual, needs)


def _fill(library: _Library, buffer: Any, array: npt.NDArray[Any]) -> None:
    size = library.number("LiteRtGetTensorBufferPackedSize", buffer)
    if size != array.nbytes:
        raise ModelError(f"LiteRT's profiler wants {size} bytes for an input of {array.nbytes}.")
    place = ctypes.c_void_p()
    library.call("LiteRtLockTensorBuffer", buffer, ctypes.byref(place), _WRITE)
    ctypes.memmove(place, array.ctypes.data, array.nbytes)
    library.call("LiteRtUnlockTensorBuffer", buffer)


def _events(library: _Library, profiler: Any) -> list[list[JsonValue]]:
    count = ctypes.c_int()
    library.call("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
    if count.value <= 0:
        raise ModelError("LiteRT's profiler reports nothing.")
    events = (_Event * count.value)()
    library.call("LiteRtGetProfilerEvents", profiler, count, events)
    if any(not event.tag or not 0 < event.kind <= _MAX_KIND for event in events):
        raise ModelError("LiteRT's profiler reports events of a form that onnxprune does not know.")
    return [
        [int(event.kind), event.tag.decode("utf-8", "replace"), int(event.operator), int(event.duration_us)]
        for event in events
    ]
