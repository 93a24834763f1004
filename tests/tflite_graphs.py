"""TFLite graphs made by hand or at random, and what LiteRT computes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Graph, Model, Tensor
from onnxprune.targets.tflite.serialize import serialize
from tests.litert import Feeds, run_file


def finished(build: Builder, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Graph:
    """The graph of what was built. Tensors called `v...` stand for values."""
    return Graph(
        name="main",
        tensors=dict(build.tensors),
        operators=tuple(build.operators),
        inputs=tuple(tensor.name for tensor in inputs),
        outputs=tuple(tensor.name for tensor in outputs),
        values=frozenset(name for name in build.tensors if name.startswith("v")),
    )


def fed(build: Builder, name: str, shape: Sequence[int]) -> Tensor:
    """An input of the graph."""
    return build.add(Tensor(name=name, type="FLOAT32", shape=tuple(shape)))


def run_graph(graph: Graph, feeds: Feeds, *, read: Sequence[str] = ()) -> dict[str, npt.NDArray[Any]]:
    """What LiteRT's own kernels (XNNPACK keeps out) compute of a graph: its outputs, and the tensors of `read`."""
    model = Model(graphs=(graph,), input_names=graph.inputs, output_names=graph.outputs)
    return run_file(serialize(model), feeds, kernels="optimized", read=read)


def feeds_for(graph: Graph, rng: np.random.Generator, *, batch: int = 3) -> dict[str, npt.NDArray[Any]]:
    """Random numbers for all inputs; dimensions that are not known become `batch`."""
    return {
        name: rng.standard_normal([batch if dim < 0 else dim for dim in graph.tensors[name].shape]).astype(np.float32)
        for name in graph.inputs
    }


def random_graph(rng: np.random.Generator, *, steps: int = 14, dynamic: bool = False) -> Graph:
    """Operators that can be reordered and operators that can't, with many transpositions and equal dimensions.

    With `dynamic` the first dimension of every input is open.
    """
    build = Builder()
    pool: list[Tensor] = []
    inputs = []
    for number in range(int(rng.integers(1, 3))):
        shape = [int(dim) for dim in rng.choice([1, 2, 2, 3, 4], size=int(rng.integers(2, 5)))]
        if dynamic:
            shape[0] = -1
        inputs.append(fed(build, f"v_in{number}", shape))
    pool.extend(inputs)
    for step in range(steps):
        build.node = f"n{step}"
        recent = pool[-4:] if rng.random() < 0.7 else pool
        tensor = recent[int(rng.integers(len(recent)))]
        made = _STEPS[int(rng.integers(len(_STEPS)))](build, tensor, pool, rng)
        for position, one in enumerate(made):
            if one.constant is not None or one in pool:
                continue
            if 0 < one.num_elements < 4000 and 1 <= one.rank <= 5:
                pool.append(
                    build.renamed(one, f"v{step}_{position}") if rng.random() < 0.7 and one in made[-1:] else one
                )
    read = {name for operator in build.operators for name in operator.inputs}
    computed = [tensor for tensor in pool if tensor not in inputs and tensor.name in build.tensors]
    outputs = [tensor for tensor in computed if tensor.name not in read or rng.random() < 0.15]
    if not outputs:
        return random_graph(rng, steps=steps, dynamic=dynamic)
    return finished(build, inputs, outputs)


_Step = Callable[[Builder, Tensor, list[Tensor], np.random.Generator], Sequence[Tensor]]


def _normal(rng: np.random.Generator, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def _known_axis(tensor: Tensor, rng: np.random.Generator) -> int | None:
    known = [axis for axis, dim in enumerate(tensor.shape) if dim > 0]
    return int(rng.choice(known)) if known else None


def _transpose(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if x.rank < 2:
        return ()
    choices = [tuple(rng.permutation(x.rank))]
    if x.rank >= 3:
        choices += [(0, *range(2, x.rank), 1), (0, x.rank - 1, *range(1, x.rank - 1))] * 2
    return (build.transposed(x, tuple(int(axis) for axis in choices[int(rng.integers(len(choices)))])),)


def _convolution(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if x.rank != 4 or x.shape[1] < 0 or min(x.shape[2:]) < 1:
        return ()
    last = build.transposed(x, (0, 2, 3, 1))
    filters = build.constant(_normal(rng, (3, 1, 1, x.shape[1])))
    bias = build.constant(_normal(rng, (3,)))
    shape = (*last.shape[:3], 3)
    y = build.op("CONV_2D", [last, filters, bias], shape=shape, padding="VALID", strideH=1, strideW=1,
                 dilationHFactor=1, dilationWFactor=1)  # fmt: skip
    return (build.transposed(y, (0, 3, 1, 2)),)


def _unary(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    return (build.op(str(rng.choice(["RELU", "TANH", "NEG", "LOGISTIC", "ABS"])), [x]),)


def _binary(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    alike = [tensor for tensor in pool if tensor.shape == x.shape]
    other = alike[int(rng.integers(len(alike)))]
    pair = (x, other) if rng.random() < 0.5 else (other, x)
    return (build.binary(str(rng.choice(["ADD", "SUB", "MUL", "MAXIMUM"])), *pair),)


def _with_constant(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    full = [1 if dim < 0 or rng.random() < 0.4 else dim for dim in x.shape]
    shape = full[int(rng.integers(len(full) + 1)) :] if rng.random() < 0.5 else full
    constant = build.constant(_normal(rng, shape))
    pair = [x, constant] if rng.random() < 0.5 else [constant, x]
    return (build.op(str(rng.choice(["ADD", "SUB", "MUL"])), pair, shape=x.shape),)


def _select(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    condition = build.op("GREATER", [x, build.constant(_normal(rng, [1] * x.rank))], shape=x.shape, type_="BOOL")
    return (build.op("SELECT_V2", [condition, x, build.constant(_normal(rng, ()))], shape=x.shape, type_="FLOAT32"),)


def _concatenation(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axis = _known_axis(x, rng)
    alike = [tensor for tensor in pool if tensor.shape == x.shape]
    if axis is None:
        return ()
    parts = [x, alike[int(rng.integers(len(alike)))]]
    if x.is_static:
        parts.append(build.constant(_normal(rng, x.shape)))
    shape = tuple(dim * len(parts) if one == axis else dim for one, dim in enumerate(x.shape))
    return (build.op("CONCATENATION", parts, shape=shape, axis=axis - x.rank if rng.random() < 0.5 else axis),)


def _split(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axes = [axis for axis, dim in enumerate(x.shape) if dim % 2 == 0]
    if not axes:
        return ()
    axis = int(rng.choice(axes))
    shape = tuple(dim // 2 if one == axis else dim for one, dim in enumerate(x.shape))
    return build.ops("SPLIT", [build.constant(axis), x], outputs=[(shape, x.type)] * 2, numSplits=2)


def _split_v(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axes = [axis for axis, dim in enumerate(x.shape) if dim > 2]
    if not axes:
        return ()
    axis = int(rng.choice(axes))
    sizes = [1, x.shape[axis] - 1]
    shapes = [tuple(size if one == axis else dim for one, dim in enumerate(x.shape)) for size in sizes]
    inputs = [x, build.constant(sizes), build.constant(axis)]
    return build.ops("SPLIT_V", inputs, outputs=[(shape, x.type) for shape in shapes], numSplits=2)


def _pad(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    rows = [[0, 0] if dim < 0 else [int(rng.integers(2)), int(rng.integers(2))] for dim in x.shape]
    if max(x.shape) > 12 or x.rank > 4:
        return ()
    shape = tuple(dim if dim < 0 else dim + sum(row) for dim, row in zip(x.shape, rows, strict=True))
    if rng.random() < 0.5:
        return (build.op("PAD", [x, build.constant(rows)], shape=shape),)
    return (build.op("PADV2", [x, build.constant(rows), build.constant(0.5)], shape=shape),)


def _slice(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    begins = [0 if dim < 2 else int(rng.integers(2)) for dim in x.shape]
    sizes = [-1 if dim < 0 else dim - begin for dim, begin in zip(x.shape, begins, strict=True)]
    return (build.op("SLICE", [x, build.constant(begins), build.constant(sizes)], shape=tuple(sizes)),)


def _strided_slice(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if x.rank > 4:
        return ()
    axis = _known_axis(x, rng)
    if axis is None:
        return ()
    given = int(rng.integers(axis + 1, x.rank + 1))
    begins, ends, strides = [0] * given, [0] * given, [1] * given
    whole = sum(1 << one for one in range(given) if one != axis)
    begin = int(rng.integers(x.shape[axis]))
    shrink = rng.random() < 0.4 and x.rank > 1
    begins[axis], ends[axis] = begin, begin + 1 if shrink else x.shape[axis]
    strides[axis] = 1 if shrink else int(rng.choice([1, 2]))
    left = -(-(x.shape[axis] - begin) // strides[axis])
    shape = [left if one == axis else dim for one, dim in enumerate(x.shape) if not (shrink and one == axis)]
    return (
        build.op("STRIDED_SLICE", [x, *(build.constant(vector) for vector in (begins, ends, strides))],
                 shape=tuple(shape), beginMask=whole, endMask=whole, shrinkAxisMask=1 << axis if shrink else 0),
    )  # fmt: skip


def _reduce(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    known = [axis for axis, dim in enumerate(x.shape) if dim > 0]
    if not known or x.rank > 4:
        return ()
    axes = [int(axis) for axis in rng.choice(known, size=int(rng.integers(1, len(known) + 1)), replace=False)]
    keep = bool(rng.random() < 0.6)
    shape = tuple(1 if axis in axes else dim for axis, dim in enumerate(x.shape) if keep or axis not in axes)
    kind = str(rng.choice(["MEAN", "SUM", "REDUCE_MAX"]))
    named = [axis - x.rank if rng.random() < 0.3 else axis for axis in axes]
    return (build.op(kind, [x, build.constant(named)], shape=shape, keepDims=keep),)


def _arg_max(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axis = _known_axis(x, rng)
    if axis is None or x.rank < 2:
        return ()
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    y = build.op("ARG_MAX", [x, build.constant(axis)], shape=shape, type_="INT32", outputType="INT32")
    return (build.cast(y, "FLOAT32"),)


def _softmax(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    return (build.op("SOFTMAX", [x], beta=1.0),) if 1 < x.rank < 5 else ()


def _tile(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axis = _known_axis(x, rng)
    if axis is None:
        return ()
    multiples = [2 if one == axis else 1 for one in range(x.rank)]
    shape = tuple(dim * many for dim, many in zip(x.shape, multiples, strict=True))
    return (build.op("TILE", [x, build.constant(multiples)], shape=tuple(max(dim, -1) for dim in shape)),)


def _gather(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axis = _known_axis(x, rng)
    if axis is None or x.rank > 4:
        return ()
    indices = rng.integers(x.shape[axis], size=[(), (3,), (2, 2)][int(rng.integers(3))]).astype(np.int32)
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return (build.op("GATHER", [x, build.constant(indices)], shape=shape, axis=axis),)


def _reverse(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axis = _known_axis(x, rng)
    if axis is None:
        return ()
    if rng.random() < 0.5:
        return (build.op("CUMSUM", [x, build.constant(axis)], shape=x.shape),)
    return (build.op("REVERSE_V2", [x, build.constant([axis])], shape=x.shape),)


def _pack(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if x.rank > 4:
        return ()
    axis = int(rng.integers(x.rank + 1))
    alike = [tensor for tensor in pool if tensor.shape == x.shape]
    parts = [x, alike[int(rng.integers(len(alike)))]]
    shape = (*x.shape[:axis], 2, *x.shape[axis:])
    return (build.op("PACK", parts, shape=shape, axis=axis, valuesCount=2),)


def _unpack(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    axis = _known_axis(x, rng)
    if axis is None or x.rank < 2:
        return ()
    shape = (*x.shape[:axis], *x.shape[axis + 1 :])
    outputs = [(shape, x.type)] * x.shape[axis]
    return build.ops("UNPACK", [x], outputs=outputs, axis=axis, num=x.shape[axis])


def _units(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    units = [axis for axis, dim in enumerate(x.shape) if dim == 1]
    if units and rng.random() < 0.5 and x.rank > 1:
        axis = int(rng.choice(units))
        return (build.op("SQUEEZE", [x], shape=(*x.shape[:axis], *x.shape[axis + 1 :]), squeezeDims=(axis,)),)
    if x.rank > 4:
        return ()
    axis = int(rng.integers(x.rank + 1))
    shape = (*x.shape[:axis], 1, *x.shape[axis:])
    return (build.op("EXPAND_DIMS", [x, build.constant(axis)], shape=shape),)


def _reshape(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    dims = list(x.shape)
    for _ in range(int(rng.integers(1, 3))):
        choice = int(rng.integers(3))
        place = int(rng.integers(len(dims)))
        if (
            choice == 0
            and place + 1 < len(dims)
            and (-1 not in dims[place : place + 2] or 1 in dims[place : place + 2])
        ):
            # An open dimension stays what it is: tensors of one shape must be of one shape when the graph runs.
            dims[place : place + 2] = [math.prod(dims[place : place + 2])]
        elif choice == 1 and dims[place] % 2 == 0 and dims[place] > 0 and len(dims) < 5:
            dims[place : place + 1] = [2, dims[place] // 2] if rng.random() < 0.5 else [dims[place] // 2, 2]
        elif choice == 2 and len(dims) < 5:
            dims.insert(place, 1)
    return (build.reshaped(x, dims),)


def _rows(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if x.rank < 2 or x.shape[-1] < 1:
        return ()
    weight, bias = build.constant(_normal(rng, (3, x.shape[-1]))), build.constant(_normal(rng, (3,)))
    return (build.op("FULLY_CONNECTED", [x, weight, bias], shape=(*x.shape[:-1], 3), keepNumDims=True),)


def _flatten(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if x.rank < 3 or min(x.shape[1:]) < 1:
        return ()
    columns = math.prod(x.shape[1:])
    flat = build.reshaped(x, (x.shape[0], columns))
    if rng.random() < 0.3:
        flat = build.op("RELU", [flat])
    outputs = []
    for _ in range(int(rng.integers(1, 3))):
        weight = build.constant(_normal(rng, (4, columns)))
        outputs.append(build.op("FULLY_CONNECTED", [flat, weight, None], shape=(x.shape[0], 4)))
    return outputs


def _matrix_product(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if not 3 <= x.rank <= 4:
        return ()
    other = build.transposed(x, (*range(x.rank - 2), x.rank - 1, x.rank - 2))
    return (build.op("BATCH_MATMUL", [x, other], shape=(*x.shape[:-1], x.shape[-2])),)


def _prelu(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    if not 2 <= x.rank <= 4 or min(x.shape[1:]) < 1:
        return ()
    slope = build.constant(_normal(rng, [1 if rng.random() < 0.5 else dim for dim in x.shape[1:]]))
    return (build.op("PRELU", [x, slope], shape=x.shape),)


def _shape(build: Builder, x: Tensor, pool: list[Tensor], rng: np.random.Generator) -> Sequence[Tensor]:
    dims = build.op("SHAPE", [x], shape=(x.rank,), type_="INT32", outType="INT32")
    return (build.cast(dims, "FLOAT32"),)


_STEPS: tuple[_Step, ...] = (
    *(_transpose, _convolution) * 4,
    *(_unary, _binary, _with_constant, _reshape) * 2,
    _select, _concatenation, _split, _split_v, _pad, _slice, _strided_slice, _reduce, _arg_max, _softmax, _tile,
    _gather, _reverse, _pack, _unpack, _units, _rows, _flatten, _matrix_product, _prelu, _shape,
)  # fmt: skip


def random_network(rng: np.random.Generator, *, steps: int = 12) -> Graph:
    """Convolutions, poolings, paddings, constant factors and summands, clamps: channels last, one after the other."""
    build = Builder()
    channels = int(rng.integers(1, 5))
    x = fed(build, "v_in", (int(rng.integers(1, 3)), int(rng.integers(5, 9)), int(rng.integers(5, 9)), channels))
    source, outputs = x, []
    for step in range(steps):
        build.node = f"n{step}"
        x = _LAYERS[int(rng.integers(len(_LAYERS)))](build, x, rng)
        if rng.random() < 0.1:
            outputs.append(x)
    outputs.append(build.op("TANH", [x]))
    kept = [one for one in dict.fromkeys(tensor.name for tensor in outputs) if one != source.name]
    return finished(build, [source], [build.tensors[name] for name in kept])


_Layer = Callable[[Builder, Tensor, np.random.Generator], Tensor]


def _windows(size: int, window: int, stride: int, *, same: bool) -> int:
    return -(-size // stride) if same else (size - window) // stride + 1


def _convolved(build: Builder, x: Tensor, rng: np.random.Generator) -> Tensor:
    window, stride = int(rng.choice([1, 2, 3])), int(rng.choice([1, 1, 2]))
    same = bool(rng.random() < 0.2)
    if min(x.shape[1:3]) < window + 1:
        return x
    size = [_windows(dim, window, stride, same=same) for dim in x.shape[1:3]]
    channels = x.shape[3]
    options: dict[str, int] = {}
    shape, outputs = (channels + 1, window, window, channels), channels + 1
    is_depthwise = bool(rng.random() < 0.4)
    if is_depthwise:
        options["depthMultiplier"] = int(rng.integers(1, 3))
        outputs = channels * options["depthMultiplier"]
        shape = (1, window, window, outputs)
    filters = build.constant(_normal(rng, shape) / np.float32(window * np.sqrt(channels)))
    # LiteRT refuses a convolution without a bias, or crashes.
    bias = build.constant(_normal(rng, (outputs,)) if rng.random() < 0.5 else np.zeros(outputs, np.float32))
    return build.op(
        "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D",
        [x, filters, bias],
        shape=(x.shape[0], *size, outputs),
        padding="SAME" if same else "VALID",
        strideH=stride,
        strideW=stride,
        dilationHFactor=1,
        dilationWFactor=1,
        **options,
    )


def _padded(build: Builder, x: Tensor, rng: np.random.Generator) -> Tensor:
    rows = [[0, 0], *([[int(rng.integers(2)), int(rng.integers(2))]] * 2), [0, 0]]
    shape = tuple(dim + sum(row) for dim, row in zip(x.shape, rows, strict=True))
    if rng.random() < 0.6:
        return build.op("PAD", [x, build.constant(rows)], shape=shape)
    lowest = build.constant(np.float32(-np.inf))
    padded = build.op("PADV2", [x, build.constant(rows), lowest], shape=shape)
    # A pooling behind it, so that minus infinity stays inside.
    return _pooled(build, padded, rng, windows=(2, 3))


def _pooled(build: Builder, x: Tensor, rng: np.random.Generator, windows: Sequence[int] = (2, 3)) -> Tensor:
    window, stride = int(rng.choice(windows)), int(rng.choice([1, 2]))
    if min(x.shape[1:3]) < window + 1:
        return build.op("MAXIMUM", [x, build.constant(np.float32(-1.0))], shape=x.shape)
    size = [_windows(dim, window, stride, same=False) for dim in x.shape[1:3]]
    return build.op("MAX_POOL_2D", [x], shape=(x.shape[0], *size, x.shape[3]), padding="VALID", strideH=stride,
                    strideW=stride, filterHeight=window, filterWidth=window)  # fmt: skip


def _scaled(build: Builder, x: Tensor, rng: np.random.Generator) -> Tensor:
    shapes = [(), (1,), (x.shape[3],), (1, 1, 1, x.shape[3]), (1, x.shape[1], 1, 1)]
    numbers = np.abs(_normal(rng, shapes[int(rng.integers(len(shapes)))])) + np.float32(0.5)
    kind = str(rng.choice(["MUL", "ADD", "SUB", "DIV"]))
    inputs = [x, build.constant(np.round(numbers) if rng.random() < 0.3 else numbers)]
    return build.op(kind, inputs if kind in ("SUB", "DIV") or rng.random() < 0.5 else inputs[::-1], shape=x.shape)


def _clamped(build: Builder, x: Tensor, rng: np.random.Generator) -> Tensor:
    choice = int(rng.integers(4))
    if choice < 2:
        return build.op(str(rng.choice(["RELU", "RELU6", "RELU_N1_TO_1"])), [x])
    low, high = [(0.0, 6.0), (-1.0, 1.0), (0.0, 1.0), (0.0, 2.0)][int(rng.integers(4))]
    order = [("MAXIMUM", low), ("MINIMUM", high)]
    for kind, bound in order if choice == 2 else order[::-1]:
        x = build.op(kind, [x, build.constant(np.float32(bound))], shape=x.shape)
    return x


def _reshaped_back(build: Builder, x: Tensor, rng: np.random.Generator) -> Tensor:
    flat = build.reshaped(x, (x.shape[0], math.prod(x.shape[1:])))
    return build.reshaped(build.op("EXPAND_DIMS", [flat, build.constant(0)], shape=(1, *flat.shape)), x.shape)


_LAYERS: tuple[_Layer, ...] = (_convolved, _convolved, _convolved, _padded, _pooled, _scaled, _scaled, _clamped,
                               _clamped, _reshaped_back)  # fmt: skip


def random_region(rng: np.random.Generator, *, steps: int = 7) -> Graph:
    """A tensor of four axes is flattened, in one way or another, computed with, and brought back."""
    build = Builder()
    batch, channels, height, width = (int(dim) for dim in rng.choice([1, 2, 3, 4], size=4))
    groups = int(rng.choice([group for group in (1, 2, 3, 4) if channels % group == 0]))
    space = height * width
    flats = [(channels * space,), (groups, channels // groups * space), (channels, space), (1, channels * space)]
    dims = (-1 if rng.random() < 0.3 else batch, *flats[int(rng.integers(len(flats)))])
    x = fed(build, "v_x", (dims[0], channels, height, width))
    flat = build.reshaped(x, dims)
    pool = [flat]
    for step in range(steps):
        build.node = f"n{step}"
        tensor = pool[int(rng.integers(len(pool)))]
        choice = int(rng.integers(4))
        if choice == 0:
            pool.append(build.op("TANH", [tensor]))
        elif choice == 1:
            other = pool[int(rng.integers(len(pool)))]
            pool.append(build.op("SUB", [tensor, other]))
        elif choice == 2:
            shape = [1, *(dim if rng.random() < 0.6 else 1 for dim in dims[1:])][int(rng.integers(2)) :]
            constant = build.constant(_normal(rng, shape))
            pool.append(build.op("MUL", [tensor, constant]))
        else:
            axes = [axis for axis in range(1, len(dims)) if rng.random() < 0.6] or [len(dims) - 1]
            kept = tuple(1 if axis in axes else dim for axis, dim in enumerate(tensor.shape))
            pool.append(build.op("MEAN", [tensor, build.constant(axes)], shape=kept, keepDims=True))
    read = {name for operator in build.operators for name in operator.inputs}
    ends = [tensor for tensor in pool if tensor.name not in read]
    outputs = [build.op("ABS", [build.reshaped(end, (end.shape[0], math.prod(end.shape[1:]), 1, 1))]) for end in ends]
    return finished(build, [x], outputs)
