"""Running `.tflite` files in LiteRT: `LitertRunner`.

A runner takes and gives what the ONNX model took and gave, so that nobody who scores, compares or times one has to know
which runtime it is: floats where the file stores int8, uint8 or int16 with a scale (`affine`), and the ONNX model's
axes where the file says that it stores them in another order (`litert_file`).

LiteRT verifies the flatbuffer, but not all that its operators read: a file made to break it can end the process. Let
`litert_foreign` look at one that onnxprune did not write.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxprune.contracts import Batch, TensorSpec
from onnxprune.errors import MissingExtraError, ModelError, OutputError, UsageError, did_you_mean, quoted_list
from onnxprune.graph.tensor_graph import TensorGraph
from onnxprune.runtime.affine import real_values, stored_integers
from onnxprune.runtime.feed_checks import checked_feeds
from onnxprune.runtime.litert_file import LitertFile, LitertTensor, read_litert_file
from onnxprune.runtime.native_log import without_native_log

__all__ = [
    "Kernels",
    "LitertRunner",
    "litert_runner_from_path",
    "require_litert",
]

Kernels = Literal["default", "without-delegate", "reference"]
"""What computes: XNNPACK and LiteRT's optimized kernels, as applications run; the latter alone; or those that stand
for the specification."""

_RESOLVERS: dict[Kernels, str] = {
    "default": "AUTO",
    "without-delegate": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    "reference": "BUILTIN_REF",
}
# What LiteRT's Python layer raises; it has no classes of its own.
_EXCEPTIONS = (RuntimeError, ValueError, TypeError, MemoryError)
_MAX_MESSAGE_CHARACTERS = 400
_SOURCE_LINE = re.compile(r"\S+\.(?:cc|h|cpp):\d+ ")
_Array = npt.NDArray[Any]


class LitertRunner:
    """A `contracts.Runner` on LiteRT's CPU kernels. Make one with `litert_runner_from_path`."""

    def __init__(
        self,
        interpreter: Any,
        file: LitertFile,
        *,
        extra: Sequence[LitertTensor],
        threads: int,
        subject: str,
        as_float: bool,
        in_source_layout: bool,
    ) -> None:
        self._interpreter = interpreter
        self._file = file
        self._results = (*file.outputs, *extra)
        self._threads = threads
        self._subject = subject
        self._as_float = as_float
        self._in_source_layout = in_source_layout
        self._inputs = tuple(self._spec(tensor) for tensor in file.inputs)
        self._outputs = tuple(self._spec(tensor) for tensor in self._results)
        self._sizes: dict[int, tuple[int, ...]] | None = None  # for which memory is laid out
        self._fed: Mapping[int, _Array] | None = None  # what the input tensors hold

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What must be fed. A dimension of None is one that the file leaves open."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, extra outputs last."""
        return self._outputs

    @property
    def stored_inputs(self) -> tuple[LitertTensor, ...]:
        """The inputs as the file stores them: integers, scales and the order of axes."""
        return self._file.inputs

    @property
    def stored_outputs(self) -> tuple[LitertTensor, ...]:
        """The outputs as the file stores them, without extra ones."""
        return self._file.outputs

    @property
    def threads(self) -> int:
        """Threads that one operator may use."""
        return self._threads

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own metadata, as far as it is text."""
        return dict(self._file.metadata)

    @property
    def graph(self) -> TensorGraph:
        """The file's operators and tensors."""
        return self._file.graph

    def run(self, feeds: Batch) -> dict[str, _Array]:
        """All outputs by name for one batch, as arrays of their own.

        Raises:
            BadDataError: A feed is missing, unknown, holds what its stored type can't, or has another element type or
                shape than declared.
            ModelError: LiteRT fails inside the graph.
        """
        stored = self._stored_feeds(feeds)
        try:
            self._feed(stored)
            if self._file.has_variables:
                # A batch must not see what the one before it left in recurrent cells.
                self._interpreter.reset_all_variables()
            self._interpreter.invoke()
            found = [self._interpreter.get_tensor(tensor.index) for tensor in self._results]
        except _EXCEPTIONS as error:
            self._sizes = self._fed = None
            raise self._run_error(error) from error
        return {tensor.name: self._shown(array, tensor) for tensor, array in zip(self._results, found, strict=True)}

    def prepare(self, feeds: Batch) -> Callable[[], object]:
        """A call that runs `feeds` again and again, without checking or copying them each time (for timing).

        It returns the outputs as they are stored: what ONNX Runtime does in such a call, and no conversion of ours.

        Raises:
            BadDataError: As in `run`.
            ModelError: LiteRT can't take these sizes.
        """
        stored = self._stored_feeds(feeds)
        invoke, get = self._interpreter.invoke, self._interpreter.get_tensor
        places = [tensor.index for tensor in self._results]

        def call() -> list[_Array]:
            if self._fed is not stored:
                self._feed(stored)
            invoke()
            return [get(place) for place in places]

        try:
            self._feed(stored)
        except _EXCEPTIONS as error:
            self._sizes = self._fed = None
            raise self._run_error(error) from error
        return call

    def stored_feeds(self, feeds: Batch) -> dict[str, _Array]:
        """`feeds` as the file stores them, by the names of the inputs.

        Raises:
            BadDataError: As in `run`.
        """
        stored = self._stored_feeds(feeds)
        return {tensor.name: stored[tensor.index] for tensor in self._file.inputs}

    def delegated_parts(self) -> tuple[tuple[int, ...], ...]:
        """The operators (their places in `graph.nodes`) of each part of the graph that XNNPACK takes, in its order."""
        operators = self._interpreter._get_ops_details()  # noqa: SLF001 - nothing public tells
        own = operators[: len(self._file.graph.nodes)]
        maker = {int(tensor): place for place, operator in enumerate(own) for tensor in operator["outputs"]}
        parts = []
        for delegate in operators[len(own) :]:
            given = {int(tensor) for tensor in delegate["inputs"]}
            wanted = [int(tensor) for tensor in delegate["outputs"]]
            members: set[int] = set()
            while wanted:
                tensor = wanted.pop()
                if tensor in given or tensor not in maker or maker[tensor] in members:
                    continue
                members.add(maker[tensor])
                wanted.extend(int(read) for read in own[maker[tensor]]["inputs"])
            parts.append(tuple(sorted(members)))
        return tuple(parts)

    def _spec(self, tensor: LitertTensor) -> TensorSpec:
        return tensor.spec(as_float=self._as_float, in_source_layout=self._in_source_layout)

    def _stored_feeds(self, feeds: Batch) -> dict[int, _Array]:
        arrays = checked_feeds(feeds, self._inputs)
        return {
            tensor.index: self._stored(array, tensor)
            for tensor, (_, array) in zip(self._file.inputs, arrays, strict=True)
        }

    def _stored(self, array: _Array, tensor: LitertTensor) -> _Array:
        if self._in_source_layout and tensor.layout:
            array = array.transpose(tensor.layout)
        if self._as_float and tensor.stands_for_floats:
            array = stored_integers(array, tensor)
        # Not `ascontiguousarray`, which gives a scalar an axis.
        return np.asarray(array, order="C")

    def _shown(self, array: _Array, tensor: LitertTensor) -> _Array:
        if self._as_float and tensor.stands_for_floats:
            array = real_values(array, tensor)
        if self._in_source_layout and tensor.layout:
            array = np.ascontiguousarray(array.transpose(np.argsort(tensor.layout)))
        return array

    def _feed(self, stored: Mapping[int, _Array]) -> None:
        sizes = {index: array.shape for index, array in stored.items()}
        if sizes != self._sizes:
            self._sizes = None
            with without_native_log():
                for index, shape in sizes.items():
                    self._interpreter.resize_tensor_input(index, shape)
                self._interpreter.allocate_tensors()
            self._sizes = sizes
        self._fed = None
        for index, array in stored.items():
            self._interpreter.set_tensor(index, array)
        self._fed = stored

    def _run_error(self, error: BaseException) -> ModelError:
        return ModelError(
            f"{self._subject} can't be run by LiteRT: {_short_message(error)}",
            "If the model has dynamic dimensions, the sizes fed may not be ones that it can take: fix them with "
            "--shape.",
        )


def litert_runner_from_path(
    path: Path,
    *,
    threads: int = 1,
    quantized_io: Literal["float", "raw"] = "float",
    layout: Literal["source", "stored"] = "source",
    kernels: Kernels = "default",
    extra_outputs: Sequence[str] = (),
) -> LitertRunner:
    """A runner for the `.tflite` file at `path`.

    Args:
        path: The file.
        threads: Threads that one operator may use, at least 1.
        quantized_io: "float": integers with a scale are taken and given as the floats that they stand for.
        layout: "source": inputs and outputs have the axes of the ONNX model, where the file says which those are.
        kernels: See `Kernels`.
        extra_outputs: Names of tensors inside to return as well, after the outputs. All tensors are kept then, which
            takes the memory of all; their numbers are those that the same kernels compute without.

    Raises:
        OutputError: There is no such file.
        MissingExtraError: LiteRT is not installed.
        UsageError: `threads` is below 1, or a tensor is unknown.
        ModelError: LiteRT can't load the file, or it has inputs or outputs that can't be fed.
    """
    if not path.is_file():
        raise OutputError(f"There is no model file '{path}'.")
    if threads < 1:
        raise UsageError(f"The number of threads must be at least 1, not {threads}.")
    require_litert(f"Running '{path.name}'")
    subject = f"'{path.name}'"
    interpreter = _interpreter(path, threads=threads, kernels=kernels, keep_all=bool(extra_outputs), subject=subject)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        file = read_litert_file(content, subject)
    runner = LitertRunner(
        interpreter,
        file,
        extra=_extra_tensors(file, extra_outputs),
        threads=threads,
        subject=subject,
        as_float=quantized_io == "float",
        in_source_layout=layout == "source",
    )
    _allocate(interpreter, subject)
    return runner


def require_litert(needed_for: str) -> None:
    """Nothing happens where LiteRT is installed.

    Raises:
        MissingExtraError: It is not.
    """
    if importlib.util.find_spec("ai_edge_litert") is None:
        raise MissingExtraError(package="ai-edge-litert", extra="tflite", needed_for=needed_for)


def _short_message(error: BaseException) -> str:
    """The heart of LiteRT's message: one line, as a sentence, without file names of its sources."""
    text = " ".join(_SOURCE_LINE.sub("", str(error)).split()) or type(error).__name__
    if len(text) > _MAX_MESSAGE_CHARACTERS:
        return text[: _MAX_MESSAGE_CHARACTERS - 4] + " ..."
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _interpreter(path: Path, *, threads: int, kernels: Kernels, keep_all: bool, subject: str) -> Any:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with without_native_log(), warnings.catch_warnings():
        # That keeping all tensors takes memory, which is what it is for.
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors.*")
        try:
            return Interpreter(
                model_path=str(path.resolve()),
                num_threads=threads,
                experimental_op_resolver_type=OpResolverType[_RESOLVERS[kernels]],
                experimental_preserve_all_tensors=keep_all,
            )
        except _EXCEPTIONS as error:
            raise _load_error(error, subject) from error


def _allocate(interpreter: Any, subject: str) -> None:
    """Make LiteRT plan its memory, which is where it refuses operators."""
    with without_native_log():
        try:
            interpreter.allocate_tensors()
        except _EXCEPTIONS as error:
            raise _load_error(error, subject) from error


def _extra_tensors(file: LitertFile, names: Sequence[str]) -> list[LitertTensor]:
    present = {tensor.name for tensor in file.outputs}
    unknown = [name for name in names if name not in file.graph.computed and name not in present]
    if unknown:
        known = sorted(file.graph.computed)
        raise UsageError(
            f"No operator of the main graph computes {quoted_list(unknown)}.",
            did_you_mean(unknown[0], known) if len(known) <= 20 else "",
        )
    return [file.tensors[name] for name in dict.fromkeys(names) if name not in present]


def _load_error(error: BaseException, subject: str) -> ModelError:
    text = str(error)
    hint = ""
    if "custom op" in text or "Select TensorFlow op" in text:
        hint = "Convert the model with built-in operators only: LiteRT has no others here."
    elif "find op for builtin opcode" in text:
        hint = "The installed LiteRT is older than the model: install a newer one."
    return ModelError(f"{subject} can't be loaded by LiteRT: {_short_message(error)}", hint)
