"""What the channels carry on calibration data: one pass over the samples, in memory that does not grow with them.

    x     a tensor that some node sums over along its axis a, which is where a removed channel counts as a zero
    mean_abs[i] = mean of |x[.., i, ..]|,   rms[i] = sqrt(mean of x[.., i, ..]^2)        over samples and other axes

ReduceL1 and ReduceSumSquare nodes beside the model's own do the summing, so that ONNX Runtime hands out two short
vectors for each tensor instead of the tensor itself; NumPy adds them up over the batches in double precision. (Unlike
extremes, sums let a NaN through: what is not finite is found.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import CalibrationSource, NullProgress, Progress
from onnxprune.errors import BadDataError
from onnxprune.graph.names import UniqueNames, printable
from onnxprune.graph.weights import add_initializer
from onnxprune.ops.channels.labelling import Contraction, Role, WeightUse
from onnxprune.ops.layout import LAYOUT
from onnxprune.passes.calibration import batch_size, num_batches, run_samples
from onnxprune.passes.prune.analysis import ChannelClasses, ChannelGroup, WeightSlices
from onnxprune.passes.prune.channel_slices import ChannelActivation, Scores
from onnxprune.runtime.sessions import ort_runner_from_model

__all__ = ["ActivationStatistics", "collect_activations"]

# Of the float model; ONNX Runtime's sums depend on how they are split among threads, so the number is fixed.
_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _AxisStatistics:
    """One number for each index of the axis."""

    mean_abs: Scores
    rms: Scores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reading:
    """One contraction: `classes` holds the class at each position, `present` each of them once, ascending."""

    contraction: Contraction
    tensor: str
    classes: npt.NDArray[np.int64]
    present: npt.NDArray[np.int64]
    statistics: _AxisStatistics


class ActivationStatistics:
    """Statistics of every labelled axis that is summed over, found by group and by weight."""

    def __init__(self, readings: Sequence[_Reading]) -> None:
        self._by_class: dict[int, list[_Reading]] = {}
        self._by_node: dict[ir.Node, list[_Reading]] = {}
        for reading in readings:
            # Classes of one group are read by the same nodes, so that any of them leads to the others.
            for number in reading.present.tolist():
                self._by_class.setdefault(number, []).append(reading)
            self._by_node.setdefault(reading.contraction.node, []).append(reading)

    def of_group(
        self, group: ChannelGroup, alive: npt.NDArray[np.bool_], weighing: Collection[ir.Node]
    ) -> tuple[ChannelActivation, ...]:
        """The group's channels that are alive, in each tensor and node that sums over them.

        `weighing` are the nodes that multiply them with a weight of the group.
        """
        if not len(group.classes):
            return ()
        wanted = group.classes[alive]
        return tuple(
            ChannelActivation(
                tensor=reading.tensor,
                node=reading.contraction.node.name or "",
                op_type=reading.contraction.node.op_type,
                has_weight=reading.contraction.node in weighing,
                mean_abs=_mean_by_class(reading, reading.statistics.mean_abs, wanted),
                rms=np.sqrt(_mean_by_class(reading, np.square(reading.statistics.rms), wanted)),
            )
            for reading in self._by_class.get(int(group.classes[0]), ())
        )

    def input_rms(
        self,
        classes: ChannelClasses,
        slices: WeightSlices,
        uses: Sequence[WeightUse],
        alive: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float64] | None:
        """Root mean square of what each position of `slices` that is alive is multiplied with.

        Position by position where the tensor's axis is indexed like the weight's (behind a Flatten, one channel has
        many positions that differ); else, in grouped convolutions, the channel's mean. A weight that several nodes use
        gets the mean of what they read. None where no node multiplies these channels with this weight.
        """
        labels = classes.classes_at(classes.labelling.weights[slices.weight][slices.axis])
        wanted = labels[slices.positions[alive]]
        squares = []
        readings = [(use, reading) for use in uses if _multiplies(use) for reading in self._by_node.get(use.node, ())]
        for use, reading in readings:
            if use.role is Role.INPUT and np.array_equal(reading.classes, labels):
                squares.append(np.square(reading.statistics.rms)[slices.positions[alive]])
            elif np.isin(wanted, reading.present).all():
                squares.append(_mean_by_class(reading, np.square(reading.statistics.rms), wanted))
        return np.sqrt(np.mean(squares, axis=0)) if squares else None


def _multiplies(use: WeightUse) -> bool:
    """True when the channels on this axis are those that come in: in a grouped convolution, filters go with them."""
    if use.role is Role.FILTER:
        layout = LAYOUT.get(use.node)
        return layout is not None and use.node.attributes.get_int(layout.group_attribute or "group", 1) > 1
    return use.role is Role.INPUT


def _mean_by_class(reading: _Reading, values: Scores, wanted: npt.NDArray[np.int64]) -> Scores:
    index = np.searchsorted(reading.present, reading.classes)
    sums = np.bincount(index, weights=values, minlength=len(reading.present))
    means = sums / np.bincount(index, minlength=len(reading.present))
    return np.asarray(means[np.searchsorted(reading.present, wanted)])


def collect_activations(
    model: ir.Model,
    classes: ChannelClasses,
    source: CalibrationSource,
    *,
    custom_op_libraries: Sequence[Path] = (),
    progress: Progress | None = None,
) -> ActivationStatistics:
    """Statistics of all channels of `model` that may be removed, over the samples of `source`.

    Raises:
        BadDataError: There is no sample, the model fails on one, or a tensor is not finite; the message says which.
    """
    progress = progress or NullProgress()
    may_go = np.zeros(classes.num_classes, dtype=np.bool_)
    for group in classes.groups:
        may_go[group.classes] = group.frozen_reason is None
    contractions = [
        contraction
        for contraction in classes.labelling.contractions
        if _is_computed(contraction) and may_go[classes.classes_at(contraction.labels)].any()
    ]
    axes = dict.fromkeys((_tensor(c), c.axis, c.rank) for c in contractions)
    if not axes:
        return ActivationStatistics([])
    tapped, outputs = _with_sums(model, list(axes))
    runner = ort_runner_from_model(tapped, threads=_THREADS, custom_op_libraries=custom_op_libraries)
    sums: dict[tuple[str, int, int], _Sums] = {}
    seen = 0
    for batch in progress.track(source, "Watching activations", num_batches(model, source, None)):
        arrays = run_samples(runner, batch, seen)
        for axis, (absolute, square, size) in zip(axes, outputs, strict=True):
            found = sums.setdefault(axis, _Sums())
            if not found.add(arrays[absolute], arrays[square], int(arrays[size])):
                raise BadDataError(
                    f"Calibration samples {seen} to {seen + batch_size(batch) - 1} make tensor '{printable(axis[0])}' "
                    "not finite.",
                    "Remove the sample, or repair the preprocessing or the weights that lead to it.",
                )
        seen += batch_size(batch)
    if not seen:
        raise BadDataError("The calibration data hold no sample.", "Give at least one; 32 to 512 are usual.")
    statistics: Mapping[tuple[str, int, int], _AxisStatistics] = {axis: found.means() for axis, found in sums.items()}
    return ActivationStatistics(
        [
            _Reading(
                contraction=contraction,
                tensor=_tensor(contraction),
                classes=at,
                present=np.unique(at),
                statistics=statistics[_tensor(contraction), contraction.axis, contraction.rank],
            )
            for contraction in contractions
            for at in (classes.classes_at(contraction.labels),)
        ]
    )


class _Sums:
    """Running sums over batches."""

    def __init__(self) -> None:
        self._absolute: Scores | float = 0.0
        self._square: Scores | float = 0.0
        self._count = 0

    def add(self, absolute: npt.NDArray[np.float32], square: npt.NDArray[np.float32], size: int) -> bool:
        """Count a tensor of `size` elements; False where it is not finite."""
        self._absolute = self._absolute + absolute.astype(np.float64)
        self._square = self._square + square.astype(np.float64)
        self._count += size // max(len(absolute), 1)
        return bool(np.isfinite(absolute).all() and np.isfinite(square).all())

    def means(self) -> _AxisStatistics:
        count = max(self._count, 1)
        return _AxisStatistics(
            mean_abs=np.asarray(self._absolute) / count, rms=np.sqrt(np.asarray(self._square) / count)
        )


def _is_computed(contraction: Contraction) -> bool:
    """False for the weights of a recurrence, which sum over what the layer itself computed a step before."""
    value = contraction.node.inputs[contraction.position]
    return value is not None and value.producer() is not None


def _tensor(contraction: Contraction) -> str:
    value = contraction.node.inputs[contraction.position]
    return "" if value is None else value.name or ""


def _with_sums(model: ir.Model, axes: Sequence[tuple[str, int, int]]) -> tuple[ir.Model, list[tuple[str, str, str]]]:
    """A clone (weights shared) that also computes, for each tensor and axis, the sums of |x| and x^2 and x's size."""
    clone = model.clone()
    graph = clone.graph
    names, node_names = UniqueNames.of_values(clone), UniqueNames.of_nodes(clone)
    values = {value.name: value for node in graph for value in node.outputs}

    def compute(op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        output = ir.Value(name=names.claim(f"{inputs[0].name}_{op_type}"))
        node = ir.Node("", op_type, inputs, attributes, outputs=[output], name=node_names.claim(output.name or ""))
        graph.append(node)
        return output

    found = []
    for tensor, axis, rank in axes:
        value = values[tensor]
        # Sums of half precision numbers would overflow.
        wide = value if value.dtype is ir.DataType.FLOAT else compute("Cast", [value], [ir.AttrInt64("to", 1)])
        if rank == 1:
            # A reduction over no axis is a reduction over all of them.
            wide = compute("Unsqueeze", [wide, add_initializer(graph, "first_axis", np.array([0]), names)])
        others = [a for a in range(max(rank, 2)) if a != axis + (rank == 1)]
        reduced = add_initializer(graph, f"{tensor}_other_axes", np.array(others, dtype=np.int64), names)
        keepdims = [ir.AttrInt64("keepdims", 0)]
        sums = [compute(op_type, [wide, reduced], keepdims) for op_type in ("ReduceL1", "ReduceSumSquare")]
        sizes = [compute("Size", [value])]
        graph.outputs.extend((*sums, *sizes))
        absolute, square, size = (output.name or "" for output in (*sums, *sizes))
        found.append((absolute, square, size))
    return clone, found
