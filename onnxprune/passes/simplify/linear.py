"""Folding per-channel scales and shifts into the linear operator before or after them.

A linear operator is y = W x + b, with output channels o and input channels i. In float64, then rounded once:

    scale * (W x + b) + shift   =  (scale_o W) x + (scale_o b + shift_o)                   after the operator
    W (scale * x + shift) + b   =  (W scale_i) x + (b + sum over i and positions of W shift_i)     before it

The second holds only where every output sees all of W: not with zero padding, unless every shift is zero.
BatchNormalization is scale = gamma / sqrt(variance + epsilon), shift = beta - mean * scale; Mul, Div, Add and Sub with
a constant per channel are the rest.

    Conv (N,I,H,W)->(N,O,H',W')  ->  BatchNormalization            =>   Conv with other W and b
    Conv -> Mul (1,O,1,1) -> Add (O,1,1)                           =>   Conv
    BatchNormalization -> Conv without padding                     =>   Conv
    MatMul (N,I)(I,O) -> Add (O)                                   =>   Gemm
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.graph.names import UniqueNames
from onnxprune.passes.simplify.edits import (
    attribute_ints,
    bypass,
    constant_input,
    input_at,
    is_standard,
    only_consumer,
    set_constant,
)

__all__ = ["fold_affine", "fold_batchnorm", "fuse_matmul_add"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Affine:
    """scale * x + shift, one value for each channel (shape (C,)) or one for all (shape ())."""

    scale: Floats
    shift: Floats

    def for_channels(self, count: int) -> _Affine | None:
        """The same with exactly `count` values each; None where that does not fit."""
        if any(array.shape not in ((), (1,), (count,)) for array in (self.scale, self.shift)):
            return None
        return _Affine(
            scale=np.broadcast_to(self.scale, (count,)).copy(), shift=np.broadcast_to(self.shift, (count,)).copy()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """A Conv, ConvTranspose or Gemm with constant weight and bias. `weight` is (G, O/G, I/G, positions)."""

    node: ir.Node
    weight: Floats
    bias: Floats
    original: npt.NDArray[Any]

    @property
    def num_outputs(self) -> int:
        return int(self.weight.shape[0] * self.weight.shape[1])

    @property
    def num_inputs(self) -> int:
        return int(self.weight.shape[0] * self.weight.shape[2])


def fold_batchnorm(model: ir.Model) -> int:
    """Every inference BatchNormalization next to a linear operator with constant weights is part of it.

    1. After Conv, ConvTranspose or Gemm whose result nothing else reads.
    2. Before a Conv without padding, or a Gemm, that alone reads it.

    Not done: for statistics that are computed, in training mode, across a reader in an `If` or `Loop` body, and for
    weights behind DequantizeLinear.

    Returns:
        How many were folded.
    """
    names = UniqueNames.of_values(model)
    folded = 0
    for node in list(model.graph.all_nodes()):
        affine = _affine_of_batchnorm(node)
        if affine is not None and (_fold_backward(node, affine, names) or _fold_forward(node, affine, names)):
            folded += 1
    return folded


def fold_affine(model: ir.Model) -> int:
    """Every Mul, Div, Add or Sub by a per-channel constant right after a linear operator is part of it.

    1. `x * c`, `x / c`, `x + c`, `x - c` and `c - x`, where c holds one value or one for each channel.
    2. The same after a BatchNormalization that could not be folded itself: part of its gamma and beta.

    Not done: before the operator (padding would see it), and where c makes the result larger than x.

    Returns:
        How many were folded.
    """
    names = UniqueNames.of_values(model)
    folded = 0
    for node in list(model.graph.all_nodes()):
        found = _affine_of_arithmetic(node)
        if found is None:
            continue
        position, affine = found
        if _fold_backward(node, affine, names, data_input=position) or _fold_into_batchnorm(
            node, affine, names, data_input=position
        ):
            folded += 1
    return folded


def fuse_matmul_add(model: ir.Model) -> int:
    """MatMul of (M,K) by a constant (K,N), plus a constant (N,), is one Gemm.

    Only for inputs of rank 2: anything else would need Reshapes, which cost more than the Add.

    Returns:
        How many pairs were fused.
    """
    fused = 0
    for add in list(model.graph.all_nodes()):
        if not is_standard(add, "Add") or add.graph is None:
            continue
        for position in (0, 1):
            product, bias = add.inputs[position], constant_input(add, 1 - position)
            matmul = product.producer() if product is not None else None
            if product is None or matmul is None or bias is None or not is_standard(matmul, "MatMul"):
                continue
            left, weight = matmul.inputs[0], constant_input(matmul, 1)
            if left is None or left.shape is None or left.shape.rank() != 2 or weight is None or weight.ndim != 2:
                continue
            if only_consumer(product) is not add or bias.shape not in ((weight.shape[1],), (1, weight.shape[1])):
                continue
            _become_gemm(add, matmul, left, add.inputs[1 - position])
            fused += 1
            break
    return fused


def _become_gemm(add: ir.Node, matmul: ir.Node, left: ir.Value, bias: ir.Value | None) -> None:
    """Turn `add` into the Gemm and remove `matmul`; name and module path are those of the node with the weight."""
    name, metadata, weight, graph = matmul.name, dict(matmul.metadata_props), matmul.inputs[1], matmul.graph
    add.op_type = "Gemm"
    add.resize_inputs(3)
    for position, value in enumerate((left, weight, bias)):
        add.replace_input_with(position, value)
    if graph is not None:
        graph.remove(matmul, safe=True)
    add.name = name
    add.metadata_props.update(metadata)


# --- the operator --------------------------------------------------------------------------------------------


def _linear(node: ir.Node | None) -> _Linear | None:
    """`node` as a linear operator with constant float weights, or None."""
    if node is None or not is_standard(node, "Conv", "ConvTranspose", "Gemm"):
        return None
    original = constant_input(node, 1)
    if original is None or not _is_float(original):
        return None
    if node.op_type == "Gemm":
        weight = _gemm_weight(node, original)
    else:
        weight = _convolution_weight(node, original)
    if weight is None:
        return None
    bias = constant_input(node, 2)
    if bias is None:
        if input_at(node, 2) is not None:
            return None
        bias = np.zeros(())
    num_outputs = weight.shape[0] * weight.shape[1]
    if node.op_type == "Gemm":
        # Gemm's C broadcasts to (M, N): only one value for each column is a bias.
        if bias.ndim == 2 and bias.shape[0] == 1:
            bias = bias[0]
        bias = bias * node.attributes.get_float("beta", 1.0)
    if bias.shape not in ((), (1,), (num_outputs,)):
        return None
    return _Linear(
        node=node,
        weight=weight,
        bias=np.broadcast_to(bias.astype(np.float64), (num_outputs,)).copy(),
        original=original,
    )


def _convolution_weight(node: ir.Node, original: npt.NDArray[Any]) -> Floats | None:
    groups = node.attributes.get_int("group", 1)
    if original.ndim < 3 or groups < 1 or original.shape[0] % groups:
        return None
    weight = original.astype(np.float64).reshape(groups, original.shape[0] // groups, original.shape[1], -1)
    # ConvTranspose stores (in, out/group, kH, kW): the axes are swapped against Conv.
    return weight.swapaxes(1, 2) if node.op_type == "ConvTranspose" else weight


def _gemm_weight(node: ir.Node, original: npt.NDArray[Any]) -> Floats | None:
    if original.ndim != 2 or node.attributes.get_int("transA", 0) != 0:
        return None
    weight = original.astype(np.float64) * node.attributes.get_float("alpha", 1.0)
    return (weight if node.attributes.get_int("transB", 0) != 0 else weight.T)[None, :, :, None]


def _rounded(linear: _Linear, weight: Floats, bias: Floats) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
    """Weight and bias as the node stores them, in its element type; None where they don't fit into it."""
    node, original = linear.node, linear.original
    if node.op_type == "Gemm":
        stored = weight[0, :, :, 0] if node.attributes.get_int("transB", 0) != 0 else weight[0, :, :, 0].T
    elif node.op_type == "ConvTranspose":
        stored = weight.swapaxes(1, 2)
    else:
        stored = weight
    with np.errstate(over="ignore"):
        new_weight, new_bias = stored.reshape(original.shape).astype(original.dtype), bias.astype(original.dtype)
    fits = np.isfinite(new_weight.astype(np.float64)).all() and np.isfinite(new_bias.astype(np.float64)).all()
    return (new_weight, new_bias) if fits else None


def _store(node: ir.Node, weight: npt.NDArray[Any], bias: npt.NDArray[Any], names: UniqueNames) -> None:
    weight_value = node.inputs[1]
    stem = weight_value.name if weight_value is not None and weight_value.name else f"{node.name}.weight"
    set_constant(node, 1, weight, names, like=stem)
    if node.op_type == "Gemm":
        # They are in the weight and in the bias now.
        node.attributes.pop("alpha", None)
        node.attributes.pop("beta", None)
    if input_at(node, 2) is not None or bias.any():
        set_constant(node, 2, bias, names, like=f"{stem.removesuffix('.weight')}.bias")


def _is_float(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


# --- folding -------------------------------------------------------------------------------------------------


def _fold_backward(node: ir.Node, affine: _Affine, names: UniqueNames, *, data_input: int = 0) -> bool:
    """Move what `node` does to its input into the linear operator that made it."""
    value = node.inputs[data_input]
    linear = _linear(value.producer()) if value is not None else None
    if value is None or linear is None or only_consumer(value) is not node:
        return False
    per_channel = affine.for_channels(linear.num_outputs)
    if per_channel is None:
        return False
    grouped = per_channel.scale.reshape(linear.weight.shape[0], -1)[:, :, None, None]
    weight = linear.weight * grouped
    bias = linear.bias * per_channel.scale + per_channel.shift
    return _replace(node, value, linear, _rounded(linear, weight, bias), names)


def _fold_forward(node: ir.Node, affine: _Affine, names: UniqueNames) -> bool:
    """Move what `node` does to its input into the linear operator that alone reads its result."""
    value, output = node.inputs[0], node.outputs[0]
    consumer = only_consumer(output)
    linear = _linear(consumer)
    if value is None or consumer is None or linear is None or consumer.inputs[0] is not output:
        return False
    per_channel = affine.for_channels(linear.num_inputs)
    if per_channel is None or not (_sees_whole_weight(consumer) or not per_channel.shift.any()):
        return False
    groups = linear.weight.shape[0]
    weight = linear.weight * per_channel.scale.reshape(groups, -1)[:, None, :, None]
    shift = np.einsum("goip,gi->go", linear.weight, per_channel.shift.reshape(groups, -1)).reshape(-1)
    bias = linear.bias + shift
    return _replace(node, value, linear, _rounded(linear, weight, bias), names)


def _fold_into_batchnorm(node: ir.Node, affine: _Affine, names: UniqueNames, *, data_input: int) -> bool:
    """Use scale * (gamma * x + beta) + shift = (scale * gamma) * x + (scale * beta + shift)."""
    value = node.inputs[data_input]
    batchnorm = value.producer() if value is not None else None
    if value is None or batchnorm is None or _affine_of_batchnorm(batchnorm) is None:
        return False
    gamma, beta = constant_input(batchnorm, 1), constant_input(batchnorm, 2)
    if gamma is None or beta is None or only_consumer(value) is not node:
        return False
    per_channel = affine.for_channels(gamma.size)
    if per_channel is None or not bypass(node, value):
        return False
    new_beta = beta.astype(np.float64) * per_channel.scale + per_channel.shift
    set_constant(batchnorm, 1, (gamma.astype(np.float64) * per_channel.scale).astype(gamma.dtype), names, like="gamma")
    set_constant(batchnorm, 2, new_beta.astype(beta.dtype), names, like="beta")
    return True


def _replace(
    node: ir.Node,
    value: ir.Value,
    linear: _Linear,
    rounded: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
    names: UniqueNames,
) -> bool:
    """Remove `node` and give `linear` its new weights; False, with nothing changed, where that is not possible."""
    if rounded is None or not bypass(node, value):
        return False
    _store(linear.node, *rounded, names)
    return True


def _sees_whole_weight(node: ir.Node) -> bool:
    """True when every output of `node` is made with all of its weights: no padding, and no partial overlap."""
    if node.op_type == "Gemm":
        return True
    return (
        node.op_type == "Conv"
        and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not any(attribute_ints(node, "pads", ()))
    )


# --- what is folded ------------------------------------------------------------------------------------------


def _affine_of_batchnorm(node: ir.Node) -> _Affine | None:
    if not is_standard(node, "BatchNormalization") or node.attributes.get_int("training_mode", 0) != 0:
        return None
    parameters = [constant_input(node, position) for position in range(1, 5)]
    arrays = [array.astype(np.float64) for array in parameters if array is not None]
    if len(arrays) != 4:
        return None
    gamma, beta, mean, variance = arrays
    scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return _Affine(scale=scale, shift=beta - mean * scale)


def _affine_of_arithmetic(node: ir.Node) -> tuple[int, _Affine] | None:
    """(position of the data input, what is done to it), or None."""
    if not is_standard(node, "Mul", "Div", "Add", "Sub"):
        return None
    for position in (0, 1):
        constant = constant_input(node, 1 - position)
        data = node.inputs[position]
        if constant is None or data is None or data.shape is None or not _is_float(constant):
            continue
        channels = _along_channel_axis(constant.astype(np.float64), rank=data.shape.rank())
        if channels is None:
            continue
        none, one = np.zeros(()), np.ones(())
        match node.op_type, position:
            case "Mul", _:
                return position, _Affine(scale=channels, shift=none)
            case "Div", 0 if channels.all():
                return position, _Affine(scale=1 / channels, shift=none)
            case "Add", _:
                return position, _Affine(scale=one, shift=channels)
            case "Sub", 0:
                return position, _Affine(scale=one, shift=-channels)
            case "Sub", 1:
                return position, _Affine(scale=-one, shift=channels)
    return None


def _along_channel_axis(constant: Floats, *, rank: int) -> Floats | None:
    """`constant`, broadcast against (N, C, ...) of `rank`, as (C,) or (); None where it differs along another axis."""
    if constant.ndim > rank or rank < 2:
        return None
    aligned = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
    if any(size != 1 for axis, size in enumerate(aligned.shape) if axis != 1):
        return None
    return aligned.reshape(-1) if aligned.size > 1 else aligned.reshape(())
