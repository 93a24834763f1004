"""Running models in ONNX Runtime: `OrtRunner`, from a file or from a graph in memory.

A runner never prints: ONNX Runtime's log is off, and what it would say comes as an `OnnxPruneError`.
Feeds are checked against the declared inputs before they reach native code.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch, TensorSpec, numpy_dtype
from onnxprune.errors import ModelError, OutputError, UsageError, did_you_mean, quoted_list
from onnxprune.graph.io import model_bytes, save_model
from onnxprune.graph.weights import weight_bytes
from onnxprune.runtime.feed_checks import checked_feeds
from onnxprune.runtime.ort_errors import load_error, ort_exceptions, run_error

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Optimization", "OrtRunner", "ort_runner_from_model", "ort_runner_from_path"]

Optimization: TypeAlias = Literal["all", "extended", "basic", "disabled"]
"""How far ONNX Runtime rewrites the graph before it runs; "all" is what applications get by default."""

# Levels of OrtLoggingLevel: only what is fatal; errors reach us as exceptions.
_LOG_FATAL = 4
_IN_MEMORY_UP_TO_BYTES = 256 << 20

_DTYPES: dict[str, str] = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "uint8": "uint8",
    "int16": "int16",
    "uint16": "uint16",
    "int32": "int32",
    "uint32": "uint32",
    "int64": "int64",
    "uint64": "uint64",
    "bool": "bool",
    "string": "object",
    "float8e4m3fn": "float8_e4m3fn",
    "float8e4m3fnuz": "float8_e4m3fnuz",
    "float8e5m2": "float8_e5m2",
    "float8e5m2fnuz": "float8_e5m2fnuz",
}
# Element types that NumPy itself does not have: ONNX Runtime takes and gives them as OrtValues only.
_ONNX_TYPE_OF_FOREIGN: dict[str, int] = {
    "bfloat16": ir.DataType.BFLOAT16.value,
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN.value,
    "float8_e4m3fnuz": ir.DataType.FLOAT8E4M3FNUZ.value,
    "float8_e5m2": ir.DataType.FLOAT8E5M2.value,
    "float8_e5m2fnuz": ir.DataType.FLOAT8E5M2FNUZ.value,
}


class OrtRunner:
    """A `contracts.Runner` on ONNX Runtime's CPU provider. Make one with the `ort_runner_from_...` functions."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        threads: int,
        subject: str,
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._outputs = outputs
        self._output_names = [spec.name for spec in outputs]
        self._threads = threads
        self._subject = subject
        self._has_foreign_outputs = any(spec.dtype in _ONNX_TYPE_OF_FOREIGN for spec in outputs)
        self._exceptions = ort_exceptions()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What must be fed. A shape of None also stands for a scalar where only ONNX Runtime was asked."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, extra outputs last."""
        return self._outputs

    @property
    def threads(self) -> int:
        """Threads that one operator may use."""
        return self._threads

    @property
    def metadata(self) -> dict[str, str]:
        """The model's own metadata properties, as ONNX Runtime sees them."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name for one batch.

        Raises:
            BadDataError: A feed is missing, unknown, or has another element type or shape than declared.
            ModelError: ONNX Runtime fails inside the graph; the message names its node.
        """
        prepared = self._prepared_feeds(feeds)
        try:
            return dict(zip(self._output_names, self._call(prepared), strict=True))
        except self._exceptions as error:
            raise run_error(error, self._subject) from error

    def prepare(self, feeds: Batch) -> Callable[[], object]:
        """A call that runs `feeds` again and again without checking them each time (for timing).

        Raises:
            BadDataError: As in `run`.
        """
        prepared = self._prepared_feeds(feeds)
        session, names = self._session, self._output_names
        if self._has_foreign_outputs:
            return lambda: self._call(prepared)
        return lambda: session.run(names, prepared)

    def end_profiling(self) -> Path:
        """Stop profiling (see `profile_prefix` of the constructor functions) and return the JSON file it wrote."""
        return Path(self._session.end_profiling())

    def _call(self, prepared: Mapping[str, Any]) -> list[Any]:
        if not self._has_foreign_outputs:
            return list(self._session.run(self._output_names, prepared))
        import onnxruntime

        values = {
            name: feed if isinstance(feed, onnxruntime.OrtValue) else onnxruntime.OrtValue.ortvalue_from_numpy(feed)
            for name, feed in prepared.items()
        }
        found = self._session.run_with_ort_values(self._output_names, values)
        return [_array_of(value, spec) for value, spec in zip(found, self._outputs, strict=True)]

    def _prepared_feeds(self, feeds: Batch) -> dict[str, Any]:
        return {
            spec.name: _as_ort_value(array, spec) if spec.dtype in _ONNX_TYPE_OF_FOREIGN else array
            for spec, array in checked_feeds(feeds, self._inputs)
        }


def ort_runner_from_path(
    path: Path,
    *,
    threads: int = 1,
    custom_op_libraries: Sequence[Path] = (),
    optimization: Optimization = "all",
    replay_saved_optimizations: bool = False,
    profile_prefix: Path | None = None,
) -> OrtRunner:
    """A runner for the `.onnx` or `.ort` file at `path`.

    Args:
        path: The file; external data are looked up beside it.
        threads: Threads that one operator may use, at least 1.
        custom_op_libraries: Shared libraries with custom operators. Loading one runs its code.
        optimization: How far ONNX Runtime rewrites the graph first. A `.ort` file keeps its own.
        replay_saved_optimizations: Apply the optimizations that a `.ort` file of the "runtime" style carries.
        profile_prefix: Record every operator's times; `end_profiling` writes them to a file that begins so.

    Raises:
        OutputError: There is no such file.
        UsageError: `threads` is below 1, or a library is missing.
        ModelError: ONNX Runtime can't load the file, or it has inputs or outputs other than tensors.
    """
    if not path.is_file():
        raise OutputError(f"There is no model file '{path}'.")
    subject = f"'{path.name}'"
    options = _session_options(threads, custom_op_libraries, optimization, profile_prefix)
    if replay_saved_optimizations:
        options.add_session_config_entry("session.enable_saved_runtime_optimizations", "1")
    return _runner(str(path.resolve()), options, threads=threads, subject=subject, declared={})


def ort_runner_from_model(
    model: ir.Model,
    *,
    threads: int = 1,
    custom_op_libraries: Sequence[Path] = (),
    optimization: Optimization = "all",
    extra_outputs: Sequence[str] = (),
    profile_prefix: Path | None = None,
    blocked_layout: bool = True,
) -> OrtRunner:
    """A runner for `model` as it is now; later changes of `model` don't reach it.

    A model above 256 MiB goes through a temporary folder (`TMPDIR`) that needs as much free space: ONNX Runtime maps
    the weights from there. As one message of 1.2 GB, a model took 24 s instead of 4 s and 2.4 GB more memory.

    Args:
        model: Any model that ONNX Runtime can load.
        threads: Threads that one operator may use, at least 1.
        custom_op_libraries: Shared libraries with custom operators.
        optimization: How far ONNX Runtime rewrites the graph first.
        extra_outputs: Names of values inside the main graph to return as well, in this order, after the model's own
            outputs. ONNX Runtime then keeps them and doesn't fuse across them.
        profile_prefix: As in `ort_runner_from_path`.
        blocked_layout: Whether float convolutions on x86 may work on channels in blocks of the vector width, as they
            do by default. `.ort` files that shall run on other machines don't.

    Raises:
        UsageError: An extra output is not the output of a node of the main graph; or `threads` is below 1.
        ModelError: ONNX Runtime can't load the model.
    """
    if extra_outputs:
        model = _with_extra_outputs(model, extra_outputs)
    subject = f"Model '{model.graph.name}'" if model.graph.name else "The model"
    options = _session_options(threads, custom_op_libraries, optimization, profile_prefix)
    declared = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs) if value.name}
    if weight_bytes(model) <= _IN_MEMORY_UP_TO_BYTES:
        return _runner(
            model_bytes(model),
            options,
            threads=threads,
            subject=subject,
            declared=declared,
            blocked_layout=blocked_layout,
        )
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path, external_data=True)
        # The session keeps what it maps alive; the names can go.
        return _runner(
            str(path), options, threads=threads, subject=subject, declared=declared, blocked_layout=blocked_layout
        )


def _runner(
    source: str | bytes,
    options: onnxruntime.SessionOptions,
    *,
    threads: int,
    subject: str,
    declared: Mapping[str, ir.Value],
    blocked_layout: bool = True,
) -> OrtRunner:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=None if blocked_layout else ["NchwcTransformer"],
        )
    except ort_exceptions() as error:
        raise load_error(error, subject) from error
    return OrtRunner(
        session,
        inputs=tuple(_spec(argument, subject, declared.get(argument.name)) for argument in session.get_inputs()),
        outputs=tuple(_spec(argument, subject, declared.get(argument.name)) for argument in session.get_outputs()),
        threads=threads,
        subject=subject,
    )


def _session_options(
    threads: int, custom_op_libraries: Sequence[Path], optimization: Optimization, profile_prefix: Path | None
) -> onnxruntime.SessionOptions:
    import onnxruntime

    if threads < 1:
        raise UsageError(f"The number of threads must be at least 1, not {threads}.")
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "disabled": levels.ORT_DISABLE_ALL,
    }[optimization]
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    for library in custom_op_libraries:
        if not library.is_file():
            raise UsageError(f"There is no custom operator library '{library}'.")
        try:
            options.register_custom_ops_library(str(library.resolve()))
        except ort_exceptions() as error:
            raise load_error(error, f"Custom operator library '{library.name}'") from error
    return options


def _with_extra_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A clone (weights shared) whose graph also returns the values called `names`."""
    clone = model.clone()
    graph = clone.graph
    values = {value.name: value for node in graph for value in node.outputs if value.name}
    unknown = [name for name in names if name not in values]
    if unknown:
        raise UsageError(
            f"No node of the main graph computes {quoted_list(unknown)}.",
            did_you_mean(unknown[0], sorted(values)) if len(values) <= 20 else "",
        )
    present = {value.name for value in graph.outputs}
    graph.outputs.extend(values[name] for name in dict.fromkeys(names) if name not in present)
    return clone


def _spec(argument: onnxruntime.NodeArg, subject: str, declared: ir.Value | None) -> TensorSpec:
    kind, _, element = argument.type.partition("(")
    dtype = _DTYPES.get(element.removesuffix(")"))
    if kind != "tensor" or dtype is None:
        raise ModelError(
            f"{subject} has '{argument.name}' of type {argument.type} among its inputs and outputs; "
            "only tensors can be fed and compared.",
            "Cut the model before that value.",
        )
    shape = tuple(argument.shape)
    if not shape:
        # ONNX Runtime says [] for a scalar and for an unknown rank alike; the graph knows which it is.
        is_scalar = declared is not None and declared.shape is not None and len(declared.shape) == 0
        return TensorSpec(name=argument.name, dtype=dtype, shape=() if is_scalar else None)
    return TensorSpec(name=argument.name, dtype=dtype, shape=shape)


def _as_ort_value(array: npt.NDArray[Any], spec: TensorSpec) -> onnxruntime.OrtValue:
    import onnxruntime

    bits = np.ascontiguousarray(array).view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_TYPE_OF_FOREIGN[spec.dtype])


def _array_of(value: onnxruntime.OrtValue, spec: TensorSpec) -> npt.NDArray[Any]:
    if spec.dtype not in _ONNX_TYPE_OF_FOREIGN:
        return np.asarray(value.numpy())
    # ONNX Runtime's own conversion refuses these types: copy the bytes of its buffer.
    dtype, shape = numpy_dtype(spec.dtype), tuple(value.shape())
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    content = ctypes.string_at(value.data_ptr(), size_bytes) if size_bytes else b""
    return np.frombuffer(content, dtype=dtype).reshape(shape).copy()
