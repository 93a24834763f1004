"""The oracle: what a pruned model must compute, said without pruning anything.

To the nodes that *sum over* an axis (Conv, Gemm, MatMul, sums) a removed channel is a zero. So: in the original, mask
the labelled axis at the input of every such node with 0 and 1; its outputs must be those of the pruned model, up to
the order of floating-point sums. Masking where channels are *produced* would be wrong: BatchNorm's shift and
Sigmoid(0) = 0.5 make something out of the zero.

Nodes that take *statistics over* an axis (LayerNorm, a mean over channels, Softmax) have no zero that changes nothing:
there the oracle is the original with the statistics taken over the kept channels. The node works on its kept channels,
and the result is spread out again; what stands at the removed places is never summed up or measured by anybody.

    x (N,L,C) -> Gather(kept) -> LayerNormalization -> Gather(rank among the kept, 0 where removed) -> y (N,L,C)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer
from onnxprune.ops.channels import ChannelPolicy, LabelArray, Labelling
from onnxprune.passes.prune.analysis import analyze_channels

__all__ = ["largest_difference", "mask_channels", "masked_model"]

Flags = npt.NDArray[np.bool_]


def masked_model(model: ir.Model, keeps: Flags, policy: ChannelPolicy | None = None) -> ir.Model:
    """A copy of `model` in which the classes that `keeps` does not keep count for nothing.

    Args:
        model: The unpruned model; stays as it is.
        keeps: One flag per class of `analyze_channels(model, policy)`.
        policy: The one that the classes were found under.
    """
    masked = model.clone()
    classes = analyze_channels(masked, policy)
    mask_channels(masked, classes.labelling, keeps[classes.class_of_label])
    return masked


def mask_channels(model: ir.Model, labelling: Labelling, stays: Flags) -> None:
    """Zero every axis that a node of `model` sums over, and take statistics over the kept channels, in place.

    Args:
        model: The model that `labelling` belongs to.
        labelling: Where sums and statistics are.
        stays: One flag per label.
    """
    edit = _Edit(model, UniqueNames.of_values(model), UniqueNames.of_nodes(model))
    measured = {found.node: None for found in labelling.measurements if not stays[found.labels].all()}
    # Everything is looked up before anything is changed: the labelling knows the values of the original.
    cuts = [(node, _cuts(labelling, node.inputs, stays), _cuts(labelling, node.outputs, stays)) for node in measured]
    for contraction in labelling.contractions:
        flags = stays[contraction.labels]
        if not flags.all() and contraction.node not in measured:
            shape = [1] * contraction.rank
            shape[contraction.axis] = len(flags)
            edit.mask_input(contraction.node, contraction.position, flags.reshape(shape))
    for node, inputs, outputs in cuts:
        for cut in inputs:
            edit.keep_of_input(node, cut.position, cut.axis, cut.flags)
        for cut in outputs:
            edit.spread_output(node, cut.position, cut.axis, cut.flags)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cut:
    """An axis of an input or output of a node that loses the positions which `flags` does not keep."""

    position: int
    axis: int
    flags: Flags


def _cuts(labelling: Labelling, values: Iterable[ir.Value | None], stays: Flags) -> list[_Cut]:
    found = []
    for position, value in enumerate(values):
        if value is None:
            continue
        axes: dict[int, LabelArray | None] = dict(enumerate(labelling.values.get(value, ())))
        axes.update(labelling.weights.get(value, {}))
        for axis, labels in axes.items():
            if labels is not None and not stays[labels].all():
                found.append(_Cut(position=position, axis=axis, flags=stays[labels]))
    return found


@dataclass(frozen=True, slots=True)
class _Edit:
    """Puts nodes before and after others."""

    model: ir.Model
    names: UniqueNames
    node_names: UniqueNames

    def mask_input(self, node: ir.Node, position: int, flags: Flags) -> None:
        """Multiply an input with 0 and 1."""
        value = _input(node, position)
        if value.dtype is None:
            raise ValueError(f"Input {position} of '{node.name}' has no element type.")
        mask = self._constant(f"{value.name}_mask", flags.astype(value.dtype.numpy()))
        product = self._value(f"{value.name}_masked", value)
        self._insert(node, "Mul", [value, mask], product)
        node.replace_input_with(position, product)

    def keep_of_input(self, node: ir.Node, position: int, axis: int, flags: Flags) -> None:
        """Give `node` only the kept positions of an axis of an input."""
        value = _input(node, position)
        kept = self._value(f"{value.name}_kept", value, axis, int(flags.sum()))
        self._insert(node, "Gather", [value, self._constant(f"{value.name}_keeps", np.flatnonzero(flags))], kept, axis)
        node.replace_input_with(position, kept)

    def spread_output(self, node: ir.Node, index: int, axis: int, flags: Flags) -> None:
        """Put what `node` makes back to the places where it was; the others get what stands at place 0."""
        value = node.outputs[index]
        ranks = np.where(flags, np.cumsum(flags) - 1, 0)
        spread = self._value(f"{value.name}_spread", value)
        ir.convenience.replace_all_uses_with(value, spread, replace_graph_outputs=True)
        # The name of an output of the model stays with what is put out.
        value.name, spread.name = spread.name, value.name
        if value.shape is not None:
            value.shape = ir.Shape([int(flags.sum()) if a == axis else dim for a, dim in enumerate(value.shape)])
        gather = self._node(node, "Gather", [value, self._constant(f"{value.name}_places", ranks)], spread, axis)
        self.model.graph.insert_after(node, gather)

    def _insert(
        self, node: ir.Node, op: str, inputs: list[ir.Value], output: ir.Value, axis: int | None = None
    ) -> None:
        self.model.graph.insert_before(node, self._node(node, op, inputs, output, axis))

    def _node(self, node: ir.Node, op: str, inputs: list[ir.Value], output: ir.Value, axis: int | None) -> ir.Node:
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        return ir.Node("", op, inputs, attributes, outputs=[output], name=self.node_names.claim(f"{node.name}_{op}"))

    def _value(self, name: str, like: ir.Value, axis: int | None = None, size: int = 0) -> ir.Value:
        shape = like.shape
        if shape is not None and axis is not None:
            shape = ir.Shape([size if a == axis else dim for a, dim in enumerate(shape)])
        return ir.Value(name=self.names.claim(name), shape=shape, type=like.type)

    def _constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        return add_initializer(self.model.graph, name, array, self.names)


def _input(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    if value is None:
        raise ValueError(f"Input {position} of '{node.name}' is left out.")
    return value


def largest_difference(expected: Batch, actual: Batch) -> float:
    """The largest absolute difference over all outputs, as a part of the largest absolute value of that output.

    Infinite where shapes differ, or one side is not finite where the other is.
    """
    worst = 0.0
    for name, wanted in expected.items():
        got = actual.get(name)
        if got is None or got.shape != wanted.shape:
            return float("inf")
        if wanted.dtype.kind not in "fc":
            worst = max(worst, 0.0 if np.array_equal(wanted, got) else float("inf"))
            continue
        wide, other = wanted.astype(np.float64), got.astype(np.float64)
        if not np.array_equal(np.isfinite(wide), np.isfinite(other)):
            return float("inf")
        finite = np.isfinite(wide)
        if finite.any():
            scale = float(np.abs(wide[finite]).max()) or 1.0
            worst = max(worst, float(np.abs(wide[finite] - other[finite]).max()) / scale)
    return worst
