"""How long single layers take on this machine at several widths, measured once and kept on disk.

A `LayerSpec` is one node with shapes in which some dimensions follow a *width variable*: so many channels a unit. Many
points (a layer at given widths) stand side by side in one small model without connections between them, which is
run with ONNX Runtime's profiler on. So every run times every point once, the points take turns, and what the machine
did meanwhile strikes all alike; the lower quartile over the runs counts, because other programs only ever add time.
Only the kernel itself is timed: changes of layout before and after it are other nodes, which layers of a real model
share or don't need. Which kernel it was is kept beside the time: one that is not the blocked one leaves its
neighbours' layout.

Times are kept in one file a layer, below a folder whose name stands for the processor, its instruction set, ONNX
Runtime's version and the number of threads. Files are written beside their place and renamed; one that can't be read is
measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import JsonValue, NullProgress, Progress, numpy_dtype
from onnxprune.errors import OnnxPruneError
from onnxprune.runtime.sessions import ort_runner_from_model
from onnxprune.runtime.timing_store import machine_key, read_timings, write_timings

__all__ = ["Dim", "LayerSpec", "OperandSpec", "Point", "Timing", "default_table_folder", "layer_times"]

Point: TypeAlias = tuple[int, ...]
"""One number for each width variable."""
_Job: TypeAlias = "tuple[LayerSpec, Point]"

_SCHEMA = 2
# One small model holds points of up to so many bytes: weights are packed once more by ONNX Runtime, outputs all live
# until the end of a run.
_CHUNK_BYTES = 192 << 20
_CHUNK_POINTS = 400
_WARMUP_RUNS = 2
_MIN_RUNS, _MAX_RUNS = 7, 40
# What one chunk's timed runs should take together; short ones run more often.
_CHUNK_S = 0.8
_IR_VERSION = 10
_POINT_EVENT = re.compile(r"point(\d+)(?!\d)\w*_kernel_time$")
_LAYOUT_OPS = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "Cast", "MemcpyFromHost", "MemcpyToHost"})


class Timing(NamedTuple):
    """Milliseconds of one run, and whether ONNX Runtime took a kernel on channels in blocks (its layout NCHWc)."""

    time_ms: float
    is_blocked: bool


@dataclass(frozen=True, slots=True)
class Dim:
    """`size` where `variable` is None, else `size` channels for each unit of that width variable."""

    size: int
    variable: int | None = None

    def at(self, point: Point) -> int:
        """The dimension at these widths."""
        return self.size if self.variable is None else self.size * point[self.variable]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandSpec:
    """One input. Weights are constants to ONNX Runtime, which packs them when it loads the model."""

    dtype: str
    dims: tuple[Dim, ...]
    is_weight: bool

    def shape_at(self, point: Point) -> tuple[int, ...]:
        """The shape at these widths."""
        return tuple(dim.at(point) for dim in self.dims)

    def bytes_at(self, point: Point) -> int:
        """Size in memory at these widths."""
        return math.prod(self.shape_at(point)) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """A node and the widths that it may have.

    Attributes:
        op_type: An operator of the standard domain.
        opset: Version of that domain.
        attributes: JSON of the attributes, names sorted; those that hold a count are given by `counts`.
        operands: One for each input, None where it is left out.
        num_outputs: How many outputs the node has.
        counts: Integer attributes that follow a width ("group" of a depthwise convolution, "hidden_size").
        output: The first output, whose size limits how many points run together.
    """

    op_type: str
    opset: int
    attributes: str
    operands: tuple[OperandSpec | None, ...]
    num_outputs: int
    counts: tuple[tuple[str, Dim], ...] = ()
    output: OperandSpec

    @property
    def key(self) -> str:
        """A hash that is equal for equal specs."""
        return hashlib.sha256(json.dumps(_to_json(self), sort_keys=True).encode()).hexdigest()[:32]

    def bytes_at(self, point: Point) -> int:
        """What one point takes in memory: weights twice, as ONNX Runtime holds a packed copy, and the output."""
        weights = sum(op.bytes_at(point) for op in self.operands if op is not None and op.is_weight)
        return 2 * weights + self.output.bytes_at(point)


def _to_json(spec: LayerSpec) -> JsonValue:
    def operand(found: OperandSpec | None) -> JsonValue:
        return found and [found.dtype, [[dim.size, dim.variable] for dim in found.dims], found.is_weight]

    return [
        spec.op_type,
        spec.opset,
        spec.attributes,
        [operand(found) for found in spec.operands],
        spec.num_outputs,
        [[name, dim.size, dim.variable] for name, dim in spec.counts],
    ]


def default_table_folder() -> Path:
    """Where tables are kept between runs: the user's cache folder of this system."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "onnxprune" / "latency"


def layer_times(
    wanted: Mapping[LayerSpec, Sequence[Point]],
    *,
    threads: int = 1,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> dict[LayerSpec, dict[Point, Timing]]:
    """The time of each layer at each of its points.

    Points that ONNX Runtime can't run, or runs as something else, are missing in the result.

    Args:
        wanted: Points by layer.
        threads: Threads that one operator may use.
        folder: Where tables are kept; None: measure everything and keep nothing.
        progress: Follows the small models.
    """
    table = _Table(folder / machine_key(threads, schema=_SCHEMA)) if folder is not None else None
    times: dict[LayerSpec, dict[Point, Timing]] = {
        spec: (table.read(spec) if table is not None else {}) for spec in wanted
    }
    missing = [(spec, point) for spec, points in wanted.items() for point in points if point not in times[spec]]
    chunks = list(_chunks(missing))
    for chunk in (progress or NullProgress()).track(chunks, "timing layers", total=len(chunks)):
        touched = {spec for spec, _ in chunk}
        for (spec, point), timing in _measure(chunk, threads).items():
            times[spec][point] = timing
        if table is not None:
            for spec in touched:
                table.write(spec, times[spec])
    return {
        spec: {point: times[spec][point] for point in points if point in times[spec]} for spec, points in wanted.items()
    }


# --- on disk --------------------------------------------------------------------------------------------------


class _Table:
    """Times of layers in a folder, one file a layer. A disk that refuses costs time in the next run, nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, spec: LayerSpec) -> dict[Point, Timing]:
        data = read_timings(self._path(spec))
        if not isinstance(data, dict):
            return {}
        try:
            points = {
                tuple(int(width) for width in point): Timing(float(time_ms), bool(is_blocked))
                for point, time_ms, is_blocked in data["points"]
            }
        except (ValueError, TypeError, KeyError):
            return {}
        is_sound = data.get("layer") == _to_json(spec) and all(
            math.isfinite(timing.time_ms) and timing.time_ms > 0 for timing in points.values()
        )
        return points if is_sound else {}

    def write(self, spec: LayerSpec, times: Mapping[Point, Timing]) -> None:
        # Another process may have measured other points of this layer meanwhile.
        merged = self.read(spec) | dict(times)
        if not merged:
            return
        content = {"layer": _to_json(spec), "points": [[list(point), *merged[point]] for point in sorted(merged)]}
        write_timings(self._path(spec), content)

    def _path(self, spec: LayerSpec) -> Path:
        return self._folder / f"{spec.key}.json"


# --- measuring ------------------------------------------------------------------------------------------------


def _chunks(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Jobs in their order, cut where a small model would become too large."""
    chunk: list[_Job] = []
    size = 0
    for spec, point in jobs:
        own = spec.bytes_at(point)
        if chunk and (size + own > _CHUNK_BYTES or len(chunk) >= _CHUNK_POINTS):
            yield chunk
            chunk, size = [], 0
        chunk.append((spec, point))
        size += own
    if chunk:
        yield chunk


def _measure(chunk: Sequence[_Job], threads: int) -> dict[_Job, Timing]:
    """The time of each job; jobs that can't run are left out."""
    try:
        runs = _run(chunk, threads)
    except OnnxPruneError:
        if len(chunk) == 1:
            return {}
        middle = len(chunk) // 2
        return _measure(chunk[:middle], threads) | _measure(chunk[middle:], threads)
    # The profiler counts whole microseconds.
    return {
        chunk[index]: Timing(max(float(np.quantile(run.durations_us, 0.25)), 0.5) / 1e3, run.is_blocked)
        for index, run in runs.items()
    }


@dataclass(slots=True)
class _PointRuns:
    """What the profiler says about one point, run by run."""

    durations_us: list[float] = field(default_factory=list)
    is_blocked: bool = False


def _run(chunk: Sequence[_Job], threads: int) -> dict[int, _PointRuns]:
    """The timed runs of every job by its index."""
    by_opset: dict[int, list[int]] = defaultdict(list)
    for index, (spec, _) in enumerate(chunk):
        by_opset[spec.opset].append(index)
    found: dict[int, _PointRuns] = {}
    for opset, indices in by_opset.items():
        model, feeds = _model([chunk[index] for index in indices], opset)
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as temporary:
            runner = ort_runner_from_model(model, threads=threads, profile_prefix=Path(temporary) / "profile")
            call = runner.prepare(feeds)
            runs = _repeat(call)
            events = json.loads(runner.end_profiling().read_text(encoding="utf-8"))
        for own_index, point_runs in _point_runs(events).items():
            # A node that ONNX Runtime cut into several, or runs a part of once, is not what was asked for.
            if len(point_runs.durations_us) == runs + _WARMUP_RUNS:
                del point_runs.durations_us[:_WARMUP_RUNS]
                found[indices[own_index]] = point_runs
    return found


def _repeat(call: Callable[[], object]) -> int:
    """Run for about `_CHUNK_S` after warming up; returns the number of runs after the warm-up."""
    for _ in range(_WARMUP_RUNS):
        started = time.perf_counter()
        call()
        once_s = time.perf_counter() - started
    runs = min(_MAX_RUNS, max(_MIN_RUNS, math.ceil(_CHUNK_S / max(once_s, 1e-6))))
    for _ in range(runs):
        call()
    return runs


def _point_runs(events: Sequence[Mapping[str, Any]]) -> dict[int, _PointRuns]:
    found: dict[int, _PointRuns] = defaultdict(_PointRuns)
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    for event in sorted(kernels, key=lambda event: event["ts"]):
        match = _POINT_EVENT.match(event["name"])
        if match is not None and event["args"]["op_name"] not in _LAYOUT_OPS:
            point_runs = found[int(match.group(1))]
            point_runs.durations_us.append(float(event["dur"]))
            point_runs.is_blocked = "nchwc" in event["name"]
    return found


def _model(jobs: Sequence[_Job], opset: int) -> tuple[ir.Model, dict[str, npt.NDArray[Any]]]:
    """A model with one node for each job and no connection between them, and what to feed."""
    inputs: dict[str, ir.Value] = {}
    feeds: dict[str, npt.NDArray[Any]] = {}
    initializers: list[ir.Value] = []
    nodes: list[ir.Node] = []
    for index, (spec, point) in enumerate(jobs):
        operands: list[ir.Value | None] = []
        for position, operand in enumerate(spec.operands):
            if operand is None:
                operands.append(None)
                continue
            shape = operand.shape_at(point)
            if operand.is_weight:
                operands.append(_constant(f"weight{index}_{position}", operand.dtype, shape))
                initializers.append(operands[-1])  # type: ignore[arg-type]
                continue
            # Equal inputs are one value: a change of layout is done once for all their readers.
            name = f"input_{operand.dtype}_{'x'.join(map(str, shape))}"
            if name not in inputs:
                inputs[name] = ir.val(name, dtype=_ir_type(operand.dtype), shape=shape)
                feeds[name] = _filled(operand.dtype, shape)
            operands.append(inputs[name])
        nodes.append(_node(spec, point, operands, f"point{index}"))
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": opset},
        name="layers",
    )
    return ir.Model(graph, ir_version=_IR_VERSION), feeds


def _node(spec: LayerSpec, point: Point, operands: Sequence[ir.Value | None], name: str) -> ir.Node:
    values = json.loads(spec.attributes) | {attribute: dim.at(point) for attribute, dim in spec.counts}
    node = ir.node(
        spec.op_type,
        list(operands),
        attributes=values,
        num_outputs=spec.num_outputs,
        name=name,
    )
    for number, output in enumerate(node.outputs):
        output.name = f"{name}_out{number}"
        output.dtype = _ir_type(spec.output.dtype)
    return node


def _ir_type(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(numpy_dtype(dtype))


def _constant(name: str, dtype: str, shape: tuple[int, ...]) -> ir.Value:
    tensor = ir.tensor(_filled(dtype, shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)


def _filled(dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Numbers between -0.5 and 0.5: no kernel's time depends on the values, but denormal and huge ones are slow."""
    pattern = (np.arange(61, dtype=np.float32) - 30) / 60
    return np.resize(pattern, shape).astype(numpy_dtype(dtype))
