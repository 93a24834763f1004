"""Operators that make numbers from shapes, lengths and bounds."""

from __future__ import annotations

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Shape, Tensor, TensorType
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView, computed_type

_COUNTED: tuple[TensorType, ...] = ("FLOAT32", "INT32", "INT64")

_WINDOWS = {
    # Coefficients of 1, of cos(x) and of cos(2x).
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}

_RANDOM = {
    "RandomNormal": "RANDOM_STANDARD_NORMAL",
    "RandomNormalLike": "RANDOM_STANDARD_NORMAL",
    "RandomUniform": "RANDOM_UNIFORM",
    "RandomUniformLike": "RANDOM_UNIFORM",
}


@TFLITE.register("Range")
def range_(node: NodeView, build: Builder) -> Tensor:
    """RANGE."""
    bounds = [node.input(position) for position in range(3)]
    type_ = bounds[0].type
    counted: TensorType = type_ if type_ in _COUNTED else "INT32"
    given = [build.scalar(build.cast(bound, counted)) for bound in bounds]
    shape = node.output_shape() or (-1,)
    return build.cast(build.op("RANGE", given, shape=shape, type_=counted), type_)


@TFLITE.register("ConstantOfShape")
def constant_of_shape(node: NodeView, build: Builder) -> Tensor:
    """FILL."""
    attribute = node.node.attributes.get("value")
    value = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
    type_ = _computed_type(node)
    number = value.reshape(-1)[0].astype(NUMPY_TYPES[type_])
    shape, known = node.input(0), node.elements(0)
    if known is not None and known.is_complete:
        return build.filled([int(length) for length in known.numbers(np.int64)], number)
    if shape.shape[0] < 0:
        raise UnsupportedError("the number of axes of its result is known only when the model runs")
    inferred = node.output_shape() or (-1,) * shape.shape[0]
    return build.op("FILL", [build.cast(shape, "INT32"), build.constant(number)], shape=inferred, type_=type_)


def _computed_type(node: NodeView) -> TensorType:
    return computed_type(node.node.outputs[0].dtype, "result")


@TFLITE.register("EyeLike")
def eye_like(node: NodeView, build: Builder) -> Tensor:
    """A constant; EQUAL of two RANGEs where a length is open."""
    x, shift = node.input(0), node.integer("k")
    type_ = _computed_type(node)
    if x.is_static:
        return build.constant(np.eye(x.shape[0], x.shape[1], shift, dtype=NUMPY_TYPES[type_]))
    ahead = _ahead(build, x)
    on_diagonal = build.binary("EQUAL", ahead, build.constant([[shift]]), type_="BOOL")
    return build.cast(on_diagonal, type_)


def _ahead(build: Builder, x: Tensor) -> Tensor:
    """INT32 (rows, columns) of the last two axes: column - row."""
    rows, columns = x.shape[-2:]
    if rows >= 0 and columns >= 0:
        return build.constant(np.arange(columns, dtype=np.int32) - np.arange(rows, dtype=np.int32)[:, None])
    counted = [_counted(build, x, axis) for axis in (x.rank - 2, x.rank - 1)]
    return build.binary("SUB", build.unsqueezed(counted[1], [0]), build.unsqueezed(counted[0], [1]))


def _counted(build: Builder, x: Tensor, axis: int) -> Tensor:
    """0, 1, 2 ... along one axis."""
    length = build.length(x, axis)
    if isinstance(length, int):
        return build.constant(np.arange(length, dtype=np.int32))
    zero, one = (build.constant(np.array(number, np.int32)) for number in (0, 1))
    return build.op("RANGE", [zero, build.scalar(length), one], shape=(-1,), type_="INT32")


@TFLITE.register("Trilu")
def trilu(node: NodeView, build: Builder) -> Tensor:
    """SELECT_V2 of the input and zero, by a constant mask where the lengths and the diagonal are known."""
    x, diagonal = node.input(0), node.optional(1)
    ahead = _ahead(build, x)
    kind = "GREATER_EQUAL" if node.integer("upper", 1) else "LESS_EQUAL"
    shift = build.constant([[0]]) if diagonal is None else build.reshaped(build.cast(diagonal, "INT32"), (1, 1))
    if ahead.constant is not None and shift.constant is not None:
        compare = np.greater_equal if node.integer("upper", 1) else np.less_equal
        kept = build.constant(compare(ahead.constant.array(), shift.constant.array()))
    else:
        kept = build.binary(kind, ahead, shift, type_="BOOL")
    zero = build.constant(np.zeros((), NUMPY_TYPES[x.type]))
    inputs = [build.with_rank(kept, x.rank), x, build.with_rank(zero, x.rank)]
    return build.op("SELECT_V2", inputs, shape=x.shape, type_=x.type)


@TFLITE.register(*_WINDOWS)
def window(node: NodeView, build: Builder) -> Tensor:
    """A constant; cosines of a RANGE where the length is computed."""
    level, first, second = _WINDOWS[node.op_type]
    length = node.array(0)
    type_ = _computed_type(node)
    is_periodic = bool(node.integer("periodic", 1))
    if length is not None:
        count = int(length.reshape(()))
        angles = np.arange(count) * (2 * np.pi / max(1, count if is_periodic else count - 1))
        numbers = level - first * np.cos(angles) + second * np.cos(2 * angles)
        return build.constant(numbers.astype(NUMPY_TYPES[type_]))
    size = build.cast(build.scalar(node.input(0)), "FLOAT32")
    zero, one = (build.constant(np.array(number, np.float32)) for number in (0, 1))
    points = build.op("RANGE", [zero, size, one], shape=(-1,), type_="FLOAT32")
    period = size if is_periodic else build.op("SUB", [size, one])
    turns = build.binary("DIV", points, period)
    found = build.constant(np.array([level], np.float32))
    for factor, circles in ((-first, 1), (second, 2)):
        if factor:
            angles_now = build.binary("MUL", turns, build.constant(np.array([2 * np.pi * circles], np.float32)))
            wave = build.op("COS", [angles_now])
            found = build.binary(
                "ADD", build.binary("MUL", wave, build.constant(np.array([factor], np.float32))), found
            )
    return build.cast(found, type_)


@TFLITE.register(*_RANDOM)
def random(node: NodeView, build: Builder) -> Tensor:
    """RANDOM_STANDARD_NORMAL or RANDOM_UNIFORM, scaled: the distribution is ONNX's, the numbers are LiteRT's."""
    if node.op_type.endswith("Like"):
        shape = build.shape_of(node.input(0))
        dims = node.input(0).shape
    else:
        dims = node.ints("shape")
        shape = build.constant(np.array(dims, np.int32))
    type_ = _computed_type(node)
    numbers = drawn(node, build, _RANDOM[node.op_type], shape, dims)
    if node.op_type.startswith("RandomNormal"):
        offset, scale = node.number("mean", 0.0), node.number("scale", 1.0)
    else:
        low = node.number("low", 0.0)
        offset, scale = low, node.number("high", 1.0) - low
    ones = (1,) * len(dims)
    if scale != 1.0:
        numbers = build.binary("MUL", numbers, build.constant(np.full(ones, scale, np.float32)))
    if offset:
        numbers = build.binary("ADD", numbers, build.constant(np.full(ones, offset, np.float32)))
    return build.cast(numbers, type_)


def drawn(node: NodeView, build: Builder, kind: str, shape: Tensor, dims: Shape) -> Tensor:
    """Random numbers by `kind`, from the seed of the node or one of its own."""
    return build.op(kind, [shape], shape=dims, type_="FLOAT32", **_seeds(node))


def _seeds(node: NodeView) -> dict[str, int]:
    # ONNX's seeds are floats (Dropout's an integer), LiteRT's integers: two zeros mean another sequence each time.
    seed = node.node.attributes.get("seed")
    number = 0 if seed is None else int(np.float32(seed.value).view(np.int32))
    return {"seed": abs(number), "seed2": int(seed is not None)}


@TFLITE.register("Multinomial")
def multinomial(node: NodeView, build: Builder) -> Tensor:
    """MULTINOMIAL, of as many numbers as asked for."""
    chances, count = node.input(0), node.integer("sample_size", 1)
    shape = (chances.shape[0], count)
    number = build.constant(np.array(count, np.int32))
    return build.op("MULTINOMIAL", [chances, number], shape=shape, type_=_computed_type(node), **_seeds(node))


@TFLITE.register("Bernoulli")
def bernoulli(node: NodeView, build: Builder) -> Tensor:
    """RANDOM_UNIFORM below the probability."""
    chance = node.input(0)
    numbers = drawn(node, build, "RANDOM_UNIFORM", build.shape_of(chance), chance.shape)
    is_one = build.binary("LESS", numbers, chance, type_="BOOL")
    return build.cast(is_one, _computed_type(node))
