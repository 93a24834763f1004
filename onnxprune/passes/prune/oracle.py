"""The oracle: what a pruned model must compute, said without pruning anything.

To the nodes that *sum over* an axis (Conv, Gemm, MatMul, sums) a removed channel is a zero. So: in the original, mask
the labelled axis at the input of every such node with 0 and 1; its outputs must be those of the pruned model, up to
the order of floating-point sums. Masking where channels are *produced* would be wrong: BatchNorm's shift and
Sigmoid(0) = 0.5 make something out of the zero.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import Batch
from onnxprune.graph.names import UniqueNames
from onnxprune.graph.weights import add_initializer
from onnxprune.ops.channels import Labelling
from onnxprune.passes.prune.analysis import analyze_channels

__all__ = ["largest_difference", "mask_contractions", "masked_model"]


def masked_model(model: ir.Model, keeps: npt.NDArray[np.bool_]) -> ir.Model:
    """A copy of `model` in which the classes that `keeps` does not keep are zeros to whatever sums over them.

    Args:
        model: The unpruned model; stays as it is.
        keeps: One flag per class of `analyze_channels(model)`.
    """
    masked = model.clone()
    classes = analyze_channels(masked)
    mask_contractions(masked, classes.labelling, keeps[classes.class_of_label])
    return masked


def mask_contractions(model: ir.Model, labelling: Labelling, stays: npt.NDArray[np.bool_]) -> None:
    """Mask every axis that a node of `model` sums over, in place.

    Args:
        model: The model that `labelling` belongs to.
        labelling: Where the contractions are.
        stays: One flag per label.
    """
    names = UniqueNames.of_values(model)
    node_names = UniqueNames.of_nodes(model)
    for contraction in labelling.contractions:
        flags = stays[contraction.labels]
        if not flags.all():
            shape = [1] * contraction.rank
            shape[contraction.axis] = len(flags)
            _mask_input(model, contraction.node, contraction.position, flags.reshape(shape), names, node_names)


def _mask_input(
    model: ir.Model,
    node: ir.Node,
    position: int,
    flags: npt.NDArray[np.bool_],
    names: UniqueNames,
    node_names: UniqueNames,
) -> None:
    value = node.inputs[position]
    if value is None or value.dtype is None:
        raise ValueError(f"Input {position} of '{node.name}' has no element type.")
    mask = add_initializer(model.graph, f"{value.name}_mask", flags.astype(value.dtype.numpy()), names)
    product = ir.Value(name=names.claim(f"{value.name}_masked"), shape=value.shape, type=value.type)
    multiply = ir.Node("", "Mul", [value, mask], outputs=[product], name=node_names.claim(f"{node.name}_mask"))
    model.graph.insert_before(node, multiply)
    node.replace_input_with(position, product)


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
