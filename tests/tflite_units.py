"""An integer node of a plan as one TFLite operator, with the very numbers of the plan."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxprune.ops.quant import pools_everything
from tests import tflite_kernels
from tests.integer_reference import Case, Integers, pads_of, stored_bias, stored_weight
from tests.tflite_files import Tensor
from tests.tflite_kernels import Operator

VALID = 1


def tflite_kernel(case: Case, *, is_reference: bool) -> Integers | None:
    """What TFLite makes of the node's integers (in ONNX's layout); None where this file has no form for it."""
    form = FORMS.get(case.node.op_type)
    made = form(case) if form is not None else None
    if made is None:
        return None
    operator, feeds = made
    (result,) = tflite_kernels.run(operator, [feed.astype(np.int8) for feed in feeds], is_reference=is_reference)
    return _channels_first(result.astype(np.int64))


def _channels_last(x: Integers) -> Integers:
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


def _channels_first(x: Integers) -> Integers:
    return np.moveaxis(x, -1, 1) if x.ndim > 2 else x


def _stored(case: Case, position: int) -> Integers:
    """int8 numbers of an input, constant or not, in TFLite's layout."""
    stored = case.centered(position) + case.affine(case.node.inputs[position]).zero_point
    return _channels_last(stored)


def _activation(case: Case, position: int, shape: tuple[int, ...]) -> Tensor:
    affine = case.affine(case.node.inputs[position])
    return Tensor(shape=shape, scales=(affine.scale,), zero_point=affine.zero_point)


def _output(case: Case) -> Tensor:
    return Tensor(shape=(), scales=(case.output.scale,), zero_point=case.output.zero_point)


def _padded(case: Case) -> Integers:
    x = case.centered(0) + case.affine(case.node.inputs[0]).zero_point
    fill = case.affine(case.node.inputs[0]).zero_point
    return _channels_last(np.pad(x, pads_of(case.node, 2), constant_values=fill))


Made = tuple[Operator, list[Integers]] | None


def _conv(case: Case) -> Made:
    weight, scales = stored_weight(case)
    group = case.node.attributes.get_int("group", 1)
    is_depthwise = group == weight.shape[0] and weight.shape[1] == 1
    if weight.ndim != 4 or (group != 1 and not is_depthwise):
        return None
    strides = case.node.attributes.get_ints("strides", [1, 1])
    dilations = case.node.attributes.get_ints("dilations", [1, 1])
    options = {
        "padding": VALID,
        "strideH": strides[0],
        "strideW": strides[1],
        "dilationHFactor": dilations[0],
        "dilationWFactor": dilations[1],
    }
    filters = weight.transpose(1, 2, 3, 0) if is_depthwise else weight.transpose(0, 2, 3, 1)
    axis = 3 if is_depthwise else 0
    if is_depthwise:
        options["depthMultiplier"] = 1
    x = _padded(case)
    bias = np.broadcast_to(stored_bias(case, scales), (weight.shape[0],))
    inputs = [
        _activation(case, 0, x.shape),
        Tensor(shape=filters.shape, scales=tuple(scales), axis=axis, data=filters),
        Tensor(shape=bias.shape, dtype=np.int32, scales=tuple(scales * case.scale(0)), data=bias),
    ]
    name = "DepthwiseConv2D" if is_depthwise else "Conv2D"
    kind = "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D"
    return (
        Operator(
            name=kind, inputs=inputs, outputs=[_output(case)], options_type=f"{name}Options", options=options, version=3
        ),
        [x],
    )


def _fully_connected(case: Case) -> Made:
    weight, scales = stored_weight(case)
    is_transposed = case.node.op_type == "Gemm" and case.node.attributes.get_int("transB", 0)
    if weight.ndim != 2 or case.centered(0).ndim != 2:
        return None
    rows = weight if is_transposed else weight.T
    x = _stored(case, 0)
    bias = np.broadcast_to(stored_bias(case, scales), (rows.shape[0],))
    inputs = [
        _activation(case, 0, x.shape),
        Tensor(shape=rows.shape, scales=tuple(scales), axis=0, data=rows),
        Tensor(shape=bias.shape, dtype=np.int32, scales=tuple(scales * case.scale(0)), data=bias),
    ]
    operator = Operator(
        name="FULLY_CONNECTED",
        inputs=inputs,
        outputs=[_output(case)],
        options_type="FullyConnectedOptions",
        options={},
        version=12 if scales.size > 1 else 4,
    )
    return operator, [x]


def _binary(name: str) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        stored = [_stored(case, position) for position in (0, 1)]
        constants = [value is not None and value.const_value is not None for value in case.node.inputs]
        if stored[0].ndim != stored[1].ndim:
            return None
        inputs = [
            Tensor(
                shape=x.shape,
                scales=(case.scale(position),),
                zero_point=case.affine(case.node.inputs[position]).zero_point,
                data=x if constants[position] else None,
            )
            for position, x in enumerate(stored)
        ]
        operator = Operator(
            name=name.upper(), inputs=inputs, outputs=[_output(case)], options_type=f"{name}Options", version=2
        )
        return operator, [x for x, is_constant in zip(stored, constants, strict=True) if not is_constant]

    return make


def _unary(name: str, options_type: str = "", version: int = 2) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        x = _stored(case, 0)
        operator = Operator(
            name=name,
            inputs=[_activation(case, 0, x.shape)],
            outputs=[_output(case)],
            options_type=options_type,
            version=version,
        )
        return operator, [x]

    return make


def _softmax(case: Case) -> Made:
    x = case.centered(0)
    # TFLite normalizes along the last axis, which is the channels'.
    if case.node.attributes.get_int("axis", -1) not in ((1,) if x.ndim > 2 else (-1, x.ndim - 1)):
        return None
    x = _stored(case, 0)
    operator = Operator(
        name="SOFTMAX",
        inputs=[_activation(case, 0, x.shape)],
        outputs=[_output(case)],
        options_type="SoftmaxOptions",
        options={"beta": 1.0},
        version=2,
    )
    return operator, [x]


def _leaky_relu(case: Case) -> Made:
    x = _stored(case, 0)
    operator = Operator(
        name="LEAKY_RELU",
        inputs=[_activation(case, 0, x.shape)],
        outputs=[_output(case)],
        options_type="LeakyReluOptions",
        options={"alpha": case.node.attributes.get_float("alpha", 0.01)},
        version=2,
    )
    return operator, [x]


def _mean(case: Case) -> Made:
    x = _stored(case, 0)
    if x.ndim != 4 or (case.node.op_type == "ReduceMean" and not case.node.attributes.get_int("keepdims", 1)):
        return None
    axes = Tensor(shape=(2,), dtype=np.int32, data=np.array([1, 2]))
    operator = Operator(
        name="MEAN",
        inputs=[_activation(case, 0, x.shape), axes],
        outputs=[_output(case)],
        options_type="ReducerOptions",
        options={"keepDims": True},
        version=2,
    )
    return operator, [x]


def _pool(name: str) -> Callable[[Case], Made]:
    def make(case: Case) -> Made:
        if name == "AVERAGE_POOL_2D" and pools_everything(case.node):
            return _mean(case)
        x = _padded(case)
        kernel = case.node.attributes.get_ints("kernel_shape", ())
        strides = case.node.attributes.get_ints("strides", [1, 1])
        options = {
            "padding": VALID,
            "strideH": strides[0],
            "strideW": strides[1],
            "filterHeight": kernel[0],
            "filterWidth": kernel[1],
        }
        operator = Operator(
            name=name,
            inputs=[_activation(case, 0, x.shape)],
            outputs=[_output(case)],
            options_type="Pool2DOptions",
            options=options,
            version=2,
        )
        return operator, [x]

    return make


def _concat(case: Case) -> Made:
    xs = [_stored(case, position) for position in range(len(case.node.inputs))]
    affines = [case.affine(value) for value in case.node.inputs]
    # Other scales are a conflict (`tflite_conflicts`): a QUANTIZE comes first there.
    if any(affine != case.output for affine in affines) or any(
        value is None or value.const_value is not None for value in case.node.inputs
    ):
        return None
    axis = case.node.attributes.get_int("axis", 0)
    last = {0: 0, 1: xs[0].ndim - 1}.get(axis, axis - 1)
    operator = Operator(
        name="CONCATENATION",
        inputs=[_activation(case, position, x.shape) for position, x in enumerate(xs)],
        outputs=[_output(case)],
        options_type="ConcatenationOptions",
        options={"axis": last},
        version=2,
    )
    return operator, xs


def _max_pool(case: Case) -> Made:
    if any(case.node.attributes.get_ints("pads", ())):
        return None
    return _pool("MAX_POOL_2D")(case)


FORMS: dict[str, Callable[[Case], Made]] = {
    "Conv": _conv,
    "Gemm": _fully_connected,
    "MatMul": _fully_connected,
    "Add": _binary("Add"),
    "Sum": _binary("Add"),
    "Mul": _binary("Mul"),
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "AveragePool": _pool("AVERAGE_POOL_2D"),
    "MaxPool": _max_pool,
    "Concat": _concat,
    "Sigmoid": _unary("LOGISTIC"),
    "Tanh": _unary("TANH"),
    "HardSwish": _unary("HARD_SWISH", "HardSwishOptions", 1),
    "Relu": _unary("RELU"),
    "Softmax": _softmax,
    "LeakyRelu": _leaky_relu,
}
