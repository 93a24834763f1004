"""How long the pruned model will take on this machine, as a function of the kept classes, without building it.

    time(keeps) = overhead + sum over timed layers  T_i * t_i(widths) / t_i(full widths)
                           + sum over other nodes   T_j * kept part of the node's output

T are the times of the nodes in the unpruned model, from ONNX Runtime's profiler: fusions and caches are in them. t_i
comes from the table of single layers (`runtime.latency_table`), measured on a grid of widths that kernels like and
interpolated between (linear along each width). What a width costs that kernels do not like is measured apart, near
half of the full width: one that is only a multiple of 8, only of 4, or odd, against the next larger width. It may be
slower, or as slow (kernels that compute whole blocks), or save what it should.

A width *pays* where all layers on it together are faster than at every larger width. Only such widths are chosen, and
wishes between two of them are rounded up: where fewer channels make a layer slower, it is left.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Progress
from onnxprune.ops.channels import MacsTerm
from onnxprune.passes.prune.analysis import ChannelClasses
from onnxprune.passes.prune.layer_specs import Layer, Widths
from onnxprune.passes.prune.limits import AxisKey, axis_key
from onnxprune.runtime.latency_table import LayerSpec, Point, Timing, default_table_folder, layer_times
from onnxprune.runtime.op_profile import OpProfile

__all__ = ["LatencyModel", "wanted_points"]

_Grid: TypeAlias = "float | list[_Grid]"
"""Milliseconds, nested by the levels of each variable."""
Keeps = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

_BLOCKS = (16, 8, 4, 1)
# Parts of the full width that a layer is timed at, by how many widths it has: 8, 25, 27 or 16 points.
_GRIDS: Mapping[int, tuple[float, ...]] = {
    1: (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
    2: (1.0, 0.75, 0.5, 0.25, 0.125),
    3: (1.0, 0.5, 0.25),
    4: (1.0, 0.5),
}
# Layers that take less than this part of the model's time together are scaled by their MACs instead.
_UNTIMED_SHARE = 0.02
# A slowdown beyond this is noise, and so is a saving below it.
_MOST_SLOWDOWN = 8.0
_LEAST_SAVING = 0.02
# A layer that falls out of the blocked layout changes layouts before and after it, and its neighbours lose what is
# fused into them; the table has the kernel alone.
_LAYOUT_SLOWDOWN = 1.25
# What ONNX Runtime takes at most for a run and between two nodes.
_CALL_OVERHEAD_MS = 0.1
_NODE_OVERHEAD_MS = 0.003
# A smaller width has to save so much of what it should save in proportion, to be told from noise.
_LEAST_PART_SAVED = 0.5


@dataclass(frozen=True, slots=True)
class _Step:
    """What a width that is only a multiple of some block costs against the next width of a larger block.

    Where it is slower, `slowdown` is the factor; else `saved` is the part that it saves of what it should save in
    proportion: 1 for a kernel that computes exactly its channels, 0 for one that computes whole larger blocks.
    """

    slowdown: float
    saved: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Curve:
    """Times of one layer: a table over the grid, and what other widths cost, by variable and block."""

    levels: tuple[tuple[int, ...], ...]
    times: _Grid
    multiples: tuple[int, ...]
    steps: tuple[Mapping[int, _Step], ...]

    @property
    def full(self) -> list[int]:
        """Every width of the unpruned layer."""
        return [level[-1] for level in self.levels]

    def relative(self, counts: Sequence[int]) -> float:
        """The time at these widths over the time at the full ones."""
        at = list(counts)
        factor = 1.0
        for variable, whole in enumerate(self.full):
            while at[variable] != whole and (block := _block_of(at[variable] * self.multiples[variable])) < _BLOCKS[0]:
                count = at[variable]
                smooth = _interpolated(self.levels, self.times, at)
                at[variable] = min(whole, _next_width(count, self.multiples[variable], block))
                step = self.steps[variable][block]
                share = 1.0 - smooth / _interpolated(self.levels, self.times, at)
                factor *= step.slowdown if step.slowdown > 1.0 else 1.0 - step.saved * share
        return factor * self.relative_smooth(at)

    def relative_smooth(self, counts: Sequence[int]) -> float:
        """As `relative`, as if every kernel computed exactly its channels."""
        whole = _interpolated(self.levels, self.times, self.full)
        return _interpolated(self.levels, self.times, counts) / whole


@dataclass(frozen=True, slots=True, eq=False)
class _TimedLayer:
    time_ms: float
    widths: tuple[int, ...]
    curve: _Curve


@dataclass(frozen=True, slots=True, eq=False)
class _ScaledNode:
    """A node whose time follows a sum of products of widths; terms are (share, numbers of the widths)."""

    time_ms: float
    terms: tuple[tuple[float, tuple[int, ...]], ...]


class LatencyModel:
    """Times of one model on this machine, relative to the unpruned model."""

    def __init__(
        self,
        model: ir.Model,
        classes: ChannelClasses,
        layers: Sequence[Layer],
        widths: Widths,
        profile: OpProfile,
        run_ms: float,
        *,
        threads: int,
        progress: Progress,
    ) -> None:
        """Read or measure the table of the layers that matter.

        Args:
            model: The unpruned model.
            classes: Its channel classes.
            layers: Those of its layers that can be timed alone.
            widths: Of the model; grows by the widths of other nodes.
            profile: Of the unpruned model, with as many threads.
            run_ms: Time of a run of it without the profiler.
            threads: Threads that one operator may use.
            progress: Follows the measuring.
        """
        self._widths = widths
        node_ms: dict[str, float] = defaultdict(float)
        for node_time in profile.nodes:
            node_ms[node_time.model_node] += node_time.p50_ms
        timed = _worth_timing(layers, node_ms)
        # Layers that differ in their full widths only share a spec, and the points that they have in common.
        wanted: dict[LayerSpec, dict[Point, None]] = defaultdict(dict)
        for layer in timed:
            wanted[layer.spec] |= dict.fromkeys(wanted_points(_full_widths(layer, widths), _multiples(layer.spec)))
        times = layer_times(
            {spec: tuple(points) for spec, points in wanted.items()},
            threads=threads,
            folder=default_table_folder(),
            progress=progress,
        )
        self._timed: list[_TimedLayer] = []
        self._scaled: list[_ScaledNode] = []
        # The profiler itself adds to the time between nodes, so a run without it tells; more than ONNX Runtime ever
        # takes there is the noise of a busy machine.
        most = _CALL_OVERHEAD_MS + _NODE_OVERHEAD_MS * len(profile.nodes)
        self.overhead_ms = min(max(0.0, run_ms - sum(node_ms.values())), most)
        done = set()
        for layer in timed:
            curve = _curve(layer.spec, times[layer.spec], _full_widths(layer, widths))
            if curve is not None:
                done.add(layer.node.name)
                self._timed.append(_TimedLayer(node_ms[layer.node.name or ""], layer.widths, curve))
        nodes = {node.name: node for node in model.graph}
        for name, time_ms in node_ms.items():
            if name not in done:
                self._scaled.append(_ScaledNode(time_ms, _terms(nodes.get(name), classes, widths)))
        self.num_timed_layers = len(self._timed)
        self._full = np.array(widths.full, dtype=np.int64)
        self._whole_ms = self._time_ms(self._full, 1.0)

    def ratio(self, keeps: Keeps) -> float:
        """The predicted time over that of the unpruned model when exactly the flagged classes stay."""
        kept_part = float(keeps.mean()) if keeps.size else 1.0
        return self._time_ms(self._widths.at(keeps), kept_part) / self._whole_ms

    def _time_ms(self, counts: Counts, kept_part: float) -> float:
        total = self.overhead_ms
        for layer in self._timed:
            total += layer.time_ms * layer.curve.relative([int(counts[number]) for number in layer.widths])
        parts = counts / self._full
        for node in self._scaled:
            # A node that stands for none of the model's (a change of layout) follows the model as a whole.
            part = 0.0 if node.terms else kept_part
            for share, numbers in node.terms:
                part += share * math.prod(float(parts[number]) for number in numbers)
            total += node.time_ms * part
        return total

    def paying_widths(self, classes: ChannelClasses) -> dict[AxisKey, Counts]:
        """For the filter axes that timed layers lie on: widths at which they are faster than at any larger width."""
        on_width: dict[int, list[tuple[_TimedLayer, int]]] = defaultdict(list)
        for layer in self._timed:
            for place, number in enumerate(layer.widths):
                on_width[number].append((layer, place))
        found: dict[AxisKey, Counts] = {}
        paying: dict[int, Counts] = {}
        for width in classes.widths:
            known = self._widths.find(width.classes)
            if known is None or known[0] not in on_width:
                continue
            number, multiple = known
            if number not in paying:
                paying[number] = self._paying(on_width[number], int(self._full[number]))
            found[axis_key(width.classes)] = paying[number] * multiple
        return found

    def _paying(self, layers: Sequence[tuple[_TimedLayer, int]], full: int) -> Counts:
        best, best_smooth = math.inf, math.inf
        paying = []
        for count in range(full, 0, -1):
            time_ms, smooth_ms = 0.0, 0.0
            for layer, place in layers:
                counts = layer.curve.full
                counts[place] = count
                time_ms += layer.time_ms * layer.curve.relative(counts)
                smooth_ms += layer.time_ms * layer.curve.relative_smooth(counts)
            if count == full or best - time_ms > max(1e-9 * best, _LEAST_PART_SAVED * (best_smooth - smooth_ms)):
                best, best_smooth = time_ms, smooth_ms
                paying.append(count)
        return np.array(paying[::-1], dtype=np.int64)


# --- which points ---------------------------------------------------------------------------------------------


def wanted_points(full: Sequence[int], multiples: Sequence[int]) -> list[Point]:
    """The points of a layer: the grid, and near its middle one width for each block that kernels may not like.

    Args:
        full: Each width of the unpruned layer.
        multiples: Channels for each unit of that width.
    """
    levels = [_levels(size, multiple, len(full)) for size, multiple in zip(full, multiples, strict=True)]
    points = list(itertools.product(*levels))
    for variable in range(len(full)):
        points += [point for _, point in _odd_points(levels, multiples, variable)]
    return list(dict.fromkeys(points))


def _levels(full: int, multiple: int, num_variables: int) -> tuple[int, ...]:
    """Widths to time, ascending: parts of `full`, moved to multiples of the largest block that leaves four steps."""
    parts = _GRIDS[min(num_variables, max(_GRIDS))]
    for block in _BLOCKS:
        step = block // math.gcd(block, multiple)
        if full // step >= 4 or block == 1:
            break
    return tuple(sorted({full, *(min(full, max(step, round(full * part / step) * step)) for part in parts)}))


def _odd_points(levels: Sequence[Sequence[int]], multiples: Sequence[int], variable: int) -> list[tuple[int, Point]]:
    """(block, point) for a width just below the middle level that is a multiple of no larger block."""
    middle = [level[len(level) // 2] for level in levels]
    found = []
    for block in _BLOCKS[1:]:
        below = middle[variable] * multiples[variable] - block
        count = below // multiples[variable]
        if below % multiples[variable] == 0 and count >= levels[variable][0] and _block_of(below) == block:
            found.append((block, tuple(count if index == variable else size for index, size in enumerate(middle))))
    return found


def _block_of(channels: int) -> int:
    return next(block for block in _BLOCKS if channels % block == 0)


def _multiples(spec: LayerSpec) -> tuple[int, ...]:
    """The most channels that a unit of each variable stands for on any axis where kernels take channels in blocks."""
    found: dict[int, int] = {}
    for operand in (*spec.operands, spec.output):
        for dim in operand.dims if operand is not None else ():
            if dim.variable is not None:
                known = found.get(dim.variable)
                found[dim.variable] = dim.size if known is None else min(known, dim.size)
    return tuple(found[variable] for variable in sorted(found))


def _full_widths(layer: Layer, widths: Widths) -> tuple[int, ...]:
    return tuple(widths.full[number] for number in layer.widths)


def _worth_timing(layers: Sequence[Layer], node_ms: Mapping[str, float]) -> list[Layer]:
    """The layers that change with some width, without the fastest ones that take little time together."""
    changing = [layer for layer in layers if layer.widths and node_ms.get(layer.node.name or "", 0.0) > 0]
    by_time = sorted(changing, key=lambda layer: node_ms[layer.node.name or ""])
    allowed = _UNTIMED_SHARE * sum(node_ms.values())
    total = 0.0
    for index, layer in enumerate(by_time):
        total += node_ms[layer.node.name or ""]
        if total > allowed:
            return by_time[index:]
    return []


# --- from points to times -------------------------------------------------------------------------------------


def _curve(spec: LayerSpec, times: Mapping[Point, Timing], full: Sequence[int]) -> _Curve | None:
    """The curve of a layer with these full widths; None where a point of its grid could not be timed."""
    multiples = _multiples(spec)
    levels = [_levels(size, multiple, len(full)) for size, multiple in zip(full, multiples, strict=True)]
    points = list(itertools.product(*levels))
    if any(point not in times for point in points):
        return None
    table = _nested([times[point].time_ms for point in points], [len(level) for level in levels])
    middle = tuple(level[len(level) // 2] for level in levels)
    steps = []
    for variable in range(len(full)):
        own: dict[int, _Step] = {}
        for block, point in _odd_points(levels, multiples, variable):
            if point in times:
                leaves_layout = times[middle].is_blocked and not times[point].is_blocked
                smooth = _interpolated(levels, table, point) / times[middle].time_ms
                own[block] = _step(times[point].time_ms / times[middle].time_ms, smooth, leaves_layout=leaves_layout)
        # A block that was not timed is taken to cost what the next larger one costs; the largest is liked by all.
        for larger, block in itertools.pairwise(_BLOCKS):
            own.setdefault(block, own.get(larger, _Step(slowdown=1.0, saved=1.0)))
        steps.append(own)
    return _Curve(levels=tuple(levels), times=table, multiples=multiples, steps=tuple(steps))


def _step(ratio: float, smooth: float, *, leaves_layout: bool) -> _Step:
    """From the time of an odd width over that of the next larger width, and what that would be in proportion."""
    if leaves_layout:
        return _Step(slowdown=min(max(ratio, _LAYOUT_SLOWDOWN), _MOST_SLOWDOWN), saved=0.0)
    if ratio > 1.0 - _LEAST_SAVING:
        return _Step(slowdown=min(max(ratio, 1.0), _MOST_SLOWDOWN) if ratio > 1.0 + _LEAST_SAVING else 1.0, saved=0.0)
    return _Step(slowdown=1.0, saved=min(1.0, (1.0 - ratio) / (1.0 - smooth)) if smooth < 1.0 else 1.0)


def _next_width(count: int, multiple: int, block: int) -> int:
    """The next larger width whose channels are a multiple of the next larger block."""
    larger = _BLOCKS[_BLOCKS.index(block) - 1]
    step = larger // math.gcd(larger, multiple)
    return (count // step + 1) * step


def _nested(times: Sequence[float], sizes: Sequence[int]) -> _Grid:
    if not sizes:
        return times[0]
    part = len(times) // sizes[0]
    return [_nested(times[index * part : (index + 1) * part], sizes[1:]) for index in range(sizes[0])]


def _interpolated(levels: Sequence[Sequence[int]], times: _Grid, counts: Sequence[int]) -> float:
    """Multilinear between the levels; below the lowest, half of its time and half in proportion to the width."""
    # Plain Python: a search asks hundreds of thousands of times for a few numbers.
    if isinstance(times, float):
        return times
    level, count = levels[0], counts[0]
    if count <= level[0]:
        lowest = _interpolated(levels[1:], times[0], counts[1:])
        return lowest * (0.5 + 0.5 * count / level[0])
    above = min(bisect.bisect_left(level, count), len(level) - 1)
    upper = _interpolated(levels[1:], times[above], counts[1:])
    if count == level[above]:
        return upper
    lower = _interpolated(levels[1:], times[above - 1], counts[1:])
    return lower + (upper - lower) * (count - level[above - 1]) / (level[above] - level[above - 1])


def _terms(node: ir.Node | None, classes: ChannelClasses, widths: Widths) -> tuple[tuple[float, tuple[int, ...]], ...]:
    """What the time of a node is proportional to: its MACs where they are known, else the size of its output."""
    if node is None:
        return ()
    labelling = classes.labelling
    terms = labelling.macs_terms.get(node)
    if terms is None:
        axes = [labels for labels in labelling.values.get(node.outputs[0], ()) if labels is not None]
        terms = (MacsTerm(1.0, tuple(axes)),)
    return tuple(
        (term.share, tuple(widths.number(classes.classes_at(labels))[0] for labels in term.axes if len(labels)))
        for term in terms
    )
