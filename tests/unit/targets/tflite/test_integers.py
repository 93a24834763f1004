"""Every operator with an integer kernel: the integer form in LiteRT against the float one, in both of its resolvers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxprune.targets.tflite.graph import (
    Constant,
    Graph,
    Grid,
    Model,
    Operator,
    OptionValue,
    Quantization,
    Tensor,
    TensorType,
)
from onnxprune.targets.tflite.integers import integerize
from onnxprune.targets.tflite.integers.table import ARITHMETIC
from onnxprune.targets.tflite.serialize import serialize

pytest.importorskip("ai_edge_litert")

from tests.litert import run_file

Array = npt.NDArray[Any]

CONV: Mapping[str, OptionValue] = {
    "padding": "SAME", "strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1,
}  # fmt: skip
POOL: Mapping[str, OptionValue] = {
    "padding": "SAME", "strideH": 1, "strideW": 1, "filterHeight": 3, "filterWidth": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator between DEQUANTIZE and QUANTIZE. Inputs: "x0", "x1" are fed, "w" is a weight, arrays are constants.

    `largest_steps` is how far the result may be from the rounded float one.
    """

    id: str
    kind: str
    inputs: tuple[str | Array | None, ...] = ("x0",)
    shapes: tuple[tuple[int, ...], ...] = ((1, 6, 7, 8),)
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    weight: tuple[int, ...] = ()
    weight_axis: int | None = None
    low: float = -3.0
    high: float = 4.0
    out: tuple[float, float] = (-5.0, 6.0)
    largest_steps: int = 1
    types: tuple[TensorType, ...] = ("INT8", "INT16")
    has_plain_kernel: bool = True
    """False: LiteRT's reference resolver lacks the operator."""


RNG = np.random.default_rng(0)
BIAS = RNG.standard_normal(16).astype(np.float32)
CASES = (
    Case(id="conv", kind="CONV_2D", inputs=("x0", "w", BIAS), weight=(16, 3, 3, 8), weight_axis=0, options=CONV),
    Case(id="conv, one scale", kind="CONV_2D", inputs=("x0", "w", BIAS), weight=(16, 3, 3, 8), options=CONV),
    Case(
        id="conv in groups",
        kind="CONV_2D",
        inputs=("x0", "w", BIAS),
        weight=(16, 3, 3, 4),
        weight_axis=0,
        options=CONV,
        types=("INT8",),
    ),
    Case(
        id="conv and relu6",
        kind="CONV_2D",
        inputs=("x0", "w", BIAS),
        weight=(16, 3, 3, 8),
        weight_axis=0,
        options={**CONV, "fusedActivationFunction": "RELU6"},
    ),
    Case(
        id="depthwise",
        kind="DEPTHWISE_CONV_2D",
        inputs=("x0", "w", BIAS[:8]),
        weight=(1, 3, 3, 8),
        weight_axis=3,
        options={**CONV, "depthMultiplier": 1},
    ),
    Case(
        id="transposed conv",
        kind="TRANSPOSE_CONV",
        inputs=(np.array([1, 12, 14, 16], np.int32), "w", "x0", BIAS),
        weight=(16, 2, 2, 8),
        weight_axis=0,
        options={"padding": "VALID", "strideH": 2, "strideW": 2},
    ),
    Case(
        id="fully connected",
        kind="FULLY_CONNECTED",
        inputs=("x0", "w", BIAS),
        shapes=((4, 24),),
        weight=(16, 24),
        weight_axis=0,
    ),
    Case(
        id="fully connected, one scale, no bias, more axes",
        kind="FULLY_CONNECTED",
        inputs=("x0", "w", None),
        shapes=((2, 3, 24),),
        weight=(16, 24),
        options={"keepNumDims": True},
    ),
    Case(id="product", kind="BATCH_MATMUL", inputs=("x0", "x1"), shapes=((2, 5, 8), (2, 8, 3)), out=(-60.0, 70.0)),
    Case(id="add", kind="ADD", inputs=("x0", "x1"), shapes=((1, 6, 7, 8), (1, 6, 7, 8))),
    Case(
        id="add, relu",
        kind="ADD",
        inputs=("x0", "x1"),
        shapes=((1, 6, 7, 8), (1, 6, 7, 8)),
        options={"fusedActivationFunction": "RELU"},
    ),
    Case(id="add a constant", kind="ADD", inputs=("x0", np.float32([1.7]))),
    Case(id="sub", kind="SUB", inputs=("x0", "x1"), shapes=((1, 6, 7, 8), (1, 1, 1, 8))),
    Case(id="mul", kind="MUL", inputs=("x0", "x1"), shapes=((1, 6, 7, 8), (1, 1, 1, 8)), out=(-11.0, 15.0)),
    Case(id="mul by a constant", kind="MUL", inputs=("x0", np.float32([-0.3])), out=(-2.0, 1.0)),
    Case(id="div by a constant", kind="DIV", inputs=("x0", np.float32([6.0])), out=(-1.0, 1.0)),
    Case(
        id="squared difference",
        kind="SQUARED_DIFFERENCE",
        inputs=("x0", "x1"),
        shapes=((1, 6, 7, 8), (1, 6, 7, 8)),
        out=(0.0, 49.0),
        types=("INT8",),
    ),
    Case(
        id="mean", kind="MEAN", inputs=("x0", np.array([1, 2], np.int32)), options={"keepDims": True}, out=(-1.0, 2.0)
    ),
    Case(id="average pool", kind="AVERAGE_POOL_2D", options=POOL, out=(-3.0, 4.0), largest_steps=2),
    Case(
        id="resize",
        kind="RESIZE_BILINEAR",
        inputs=("x0", np.array([12, 14], np.int32)),
        options={"halfPixelCenters": True},
        out=(-3.0, 4.0),
    ),
    Case(id="logistic", kind="LOGISTIC", out=(0.0, 1.0), types=("INT8", "INT16"), largest_steps=4),
    Case(id="logistic with another scale", kind="LOGISTIC", out=(0.0, 0.7), types=("INT8",), largest_steps=2),
    Case(id="softmax", kind="SOFTMAX", out=(0.0, 1.0), options={"beta": 1.0}, largest_steps=4),
    Case(id="tanh", kind="TANH", out=(-1.0, 1.0), largest_steps=4),
    Case(id="relu", kind="RELU"),
    Case(id="relu6", kind="RELU6", high=9.0),
    Case(id="relu -1 to 1", kind="RELU_N1_TO_1", types=("INT8",)),
    Case(id="relu 0 to 1", kind="RELU_0_TO_1", types=("INT8",)),
    Case(id="leaky relu", kind="LEAKY_RELU", options={"alpha": 0.1}),
    Case(id="prelu", kind="PRELU", inputs=("x0", "w"), weight=(1, 1, 8), types=("INT8",)),
    Case(id="hard swish", kind="HARD_SWISH", out=(-0.4, 4.0), types=("INT8",)),
    Case(id="elu", kind="ELU", out=(-1.0, 4.0), types=("INT8",), has_plain_kernel=False),
    Case(id="gelu", kind="GELU", out=(-0.2, 4.0), types=("INT8",)),
    Case(id="exp", kind="EXP", low=-3.0, high=1.0, out=(0.0, 3.0), largest_steps=8),
    Case(id="abs", kind="ABS", out=(0.0, 4.0)),
    Case(id="rsqrt", kind="RSQRT", low=0.0, high=4.0, out=(0.0, 3.0), largest_steps=2),
    Case(id="maximum", kind="MAXIMUM", inputs=("x0", "x1"), shapes=((1, 6, 7, 8), (1, 6, 7, 8)), largest_steps=2),
    Case(id="minimum", kind="MINIMUM", inputs=("x0", "x1"), shapes=((1, 6, 7, 8), (1, 6, 7, 8)), largest_steps=2),
)


def form_of(low: float, high: float, type_: TensorType) -> Quantization:
    """The range in 8 bits, or in 16 with zero point 0."""
    if type_ == "INT16":
        return Quantization(scales=(float(np.float32(max(-low, high) / 32767)),), zero_points=(0,))
    scale = float(np.float32((high - low) / 255))
    return Quantization(scales=(scale,), zero_points=(round(-128 - low / scale),))


def graph_of(case: Case, type_: TensorType) -> Graph:
    """x0 -> QUANTIZE -> DEQUANTIZE -> operator -> QUANTIZE -> DEQUANTIZE -> y, with float shapes found by LiteRT."""
    tensors: dict[str, Tensor] = {}
    operators: list[Operator] = []

    def add(tensor: Tensor) -> str:
        tensors[tensor.name] = tensor
        return tensor.name

    def quantized(name: str, shape: tuple[int, ...], form: Quantization) -> str:
        integers = add(Tensor(name=f"{name}_integers", type=type_, shape=shape, quantization=form))
        real = add(Tensor(name=f"{name}_real", type="FLOAT32", shape=shape))
        operators.append(Operator(kind="QUANTIZE", inputs=(name,), outputs=(integers,)))
        operators.append(Operator(kind="DEQUANTIZE", inputs=(integers,), outputs=(real,)))
        return real

    names: list[str] = []
    for position, given in enumerate(case.inputs):
        if given is None:
            names.append("")
        elif isinstance(given, np.ndarray):
            kind: TensorType = "INT32" if given.dtype == np.int32 else "FLOAT32"
            names.append(add(Tensor(name=f"c{position}", type=kind, shape=given.shape, constant=Constant.of(given))))
        elif given == "w":
            names.append(add(weight_of(case)))
        else:
            shape = case.shapes[int(given[1:])]
            add(Tensor(name=given, type="FLOAT32", shape=shape))
            # Inputs of different ranges, so that scales differ.
            factor = 1.0 if given == "x0" or case.kind == "BATCH_MATMUL" else 0.9
            names.append(quantized(given, shape, form_of(factor * case.low, factor * case.high, type_)))
    shape = float_run(case, tensors, names)
    add(Tensor(name="raw", type="FLOAT32", shape=shape))
    operators.append(Operator(kind=case.kind, inputs=tuple(names), outputs=("raw",), options=case.options))
    real = quantized("raw", shape, out_form(case, type_))
    feeds = tuple(f"x{index}" for index in range(len(case.shapes)))
    return Graph(name="case", tensors=tensors, operators=tuple(operators), inputs=feeds, outputs=(real,))


def out_form(case: Case, type_: TensorType) -> Quantization:
    row = ARITHMETIC.get(case.kind)
    is_fixed = row is not None and row.fixed and case.out in ((0.0, 1.0), (-1.0, 1.0))
    return row.fixed[type_] if is_fixed and row is not None else form_of(*case.out, type_)


def float_run(case: Case, tensors: Mapping[str, Tensor], names: list[str]) -> tuple[int, ...]:
    """The shape of the operator's output."""
    real = {name: tensor for name, tensor in tensors.items() if name in names}
    fed = tuple(name for name in names if name and real[name].constant is None)
    operator = Operator(kind=case.kind, inputs=tuple(names), outputs=("raw",), options=case.options)
    raw = Tensor(name="raw", type="FLOAT32", shape=())
    graph = Graph(name="float", tensors={**real, "raw": raw}, operators=(operator,), inputs=fed, outputs=("raw",))
    feeds = {name: np.zeros(tensors[name].shape, np.float32) for name in fed}
    return run(graph, feeds, is_reference=False)["raw"].shape


def weight_of(case: Case) -> Tensor:
    """Numbers of 8 bits, with a scale for each index of `weight_axis`."""
    axis = case.weight_axis
    count = 1 if axis is None else case.weight[axis]
    scales = np.geomspace(0.001, 0.003, count).astype(np.float32)
    spread = scales.reshape((-1, *(1,) * (len(case.weight) - 1 - (axis or 0)))) if count > 1 else scales.reshape(())
    integers = np.random.default_rng(1).integers(-127, 128, case.weight)
    form = Quantization(scales=tuple(map(float, scales)), zero_points=(0,) * count, axis=axis or 0)
    constant = Constant.of((integers * spread.astype(np.float64)).astype(np.float32))
    return Tensor(
        name="w",
        type="FLOAT32",
        shape=case.weight,
        constant=replace(constant, grid=Grid(type="INT8", quantization=form)),
    )


def run(graph: Graph, feeds: Mapping[str, Array], *, is_reference: bool) -> dict[str, Array]:
    """Outputs by name. The reference kernels are LiteRT's plain ones; applications run XNNPACK's."""
    model = Model(graphs=(graph,), input_names=graph.inputs, output_names=graph.outputs)
    return run_file(serialize(model), feeds, kernels="reference" if is_reference else "XNNPACK")


def feeds_of(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(2)
    return {
        f"x{index}": rng.uniform(case.low, case.high, shape).astype(np.float32)
        for index, shape in enumerate(case.shapes)
    }


RUNS = [
    pytest.param(case, type_, is_reference, id=f"{case.id}, {type_}, {'plain' if is_reference else 'XNNPACK'}")
    for case in CASES
    for type_ in case.types
    for is_reference in ((True, False) if case.has_plain_kernel else (False,))
]


@pytest.mark.parametrize(("case", "type_", "is_reference"), RUNS)
def test_integer_operator_gives_the_rounded_result_of_the_float_one(
    case: Case, type_: TensorType, is_reference: bool
) -> None:
    graph = graph_of(case, type_)
    made = integerize(graph, float_io=True)
    feeds = feeds_of(case)

    expected = run(graph, feeds, is_reference=False)["raw_real"]
    actual = run(made.graph, feeds, is_reference=is_reference)["raw_real"]

    kind = "MUL" if case.kind == "DIV" else case.kind
    operator = next(one for one in made.graph.operators if one.kind == kind)
    assert made.graph.tensors[operator.outputs[0]].type == type_, made.float_reasons
    steps = np.abs(actual.astype(np.float64) - expected) / out_form(case, type_).scales[0]
    # The float operator adds in another order and rounds once; 16 bits show what 8 bits hide.
    allowed = case.largest_steps if type_ == "INT8" else 8 * case.largest_steps
    assert steps.max() <= allowed + 0.01, f"{steps.max():.2f} steps"
