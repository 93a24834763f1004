"""Constants computed ahead, within bounds.

A node is folded when it is deterministic, all its inputs are constants (or it asks only for a shape that is static),
and its results are no larger than the constants that disappear with it plus 1 MiB. Nodes that lead from weights to a
weight (weight standardization) are looked at together: what counts is what is left in the end. Sizes are taken from
inferred shapes before anything is computed. Never folded: QuantizeLinear and DequantizeLinear (the integers of a weight
are the point of it), the Cast of weights stored in half precision (so is their size), random operators, control flow.

Nodes are evaluated by onnx's reference implementation: NumPy code that can't crash the process, is the same on every
machine, and knows nothing of threads. Where it deviates from the specification (integer division), the node is
computed here or left alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.reference
import onnx_ir as ir

from onnxprune.graph.cleanup import hand_over

__all__ = ["FoldingBudget", "fold_constants"]

MAX_GROWTH_BYTES = 1 << 20
"""A result may be larger than what it replaces by this much."""
MAX_TOTAL_GROWTH_BYTES = 64 << 20
"""All results of one model together."""
_MAX_MULTIPLICATIONS = 2_000_000_000
_KEEP_ON_DISK_ABOVE_BYTES = 1 << 20

# They only move elements, so any element type is safe.
_MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "Slice"}
    | {"Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where", "ConstantOfShape"}
)
_ARITHMETIC = frozenset(
    {"Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Cos", "CumSum", "Div", "Equal", "Erf", "Exp", "Floor"}
    | {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg"}
    | {"Not", "Or", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin"}
    | {"ReduceProd", "ReduceSum", "ReduceSumSquare", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Sub", "Tanh", "Xor"}
    # Weight standardization (BiT, NF-Net) is spelled with these; BatchNormalization only outside of training mode.
    | {"BatchNormalization", "InstanceNormalization", "LayerNormalization"}
)
# Half precision is computed by runtimes in float32 and rounded once; NumPy rounds at each step.
_ARITHMETIC_TYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL}
    | {ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64}
    | {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
)
# What NumPy code raises on input that it can't take.
_EVALUATION_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class FoldingBudget:
    """How much all folded results together may grow one model."""

    def __init__(self, max_bytes: int = MAX_TOTAL_GROWTH_BYTES) -> None:
        self._left = max_bytes

    def allows(self, growth_bytes: int) -> bool:
        """Take `growth_bytes` if they are within bounds."""
        if growth_bytes > min(MAX_GROWTH_BYTES, self._left):
            return False
        self._left -= max(0, growth_bytes)
        return True


def fold_constants(model: ir.Model, *, budget: FoldingBudget | None = None) -> bool:
    """Replace every node that can be folded by initializers named like its outputs; True if there was one.

    Shapes must be fresh. Results that are large and come from weights on disk stay lazy: they are computed when read.
    `budget` is what several calls for one model may use together.
    """
    budget = budget or FoldingBudget()
    folded = False
    for graph in list(model.graphs()):
        free_of_charge = _nodes_that_shrink_together(graph)
        for node in graph:
            folded |= _fold_node(node, graph, model, None if node in free_of_charge else budget)
    return folded


def _nodes_that_shrink_together(graph: ir.Graph) -> frozenset[ir.Node]:
    """Nodes that depend on constants only, in connected sets whose results are no larger than what they use up."""
    set_of: dict[ir.Node, list[ir.Node]] = {}
    for node in graph:
        producers = [value.producer() for value in node.inputs if value is not None and _constant(value) is None]
        if not _can_be_computed(node) or any(producer not in set_of for producer in producers):
            continue
        members = [node]
        for producer in producers:
            other = set_of[producer]  # type: ignore[index]
            if other is not members:
                members, other = (members, other) if len(members) >= len(other) else (other, members)
                members.extend(other)
                for moved in other:
                    set_of[moved] = members
        set_of[node] = members
    found: set[ir.Node] = set()
    for members in {id(members): members for members in set_of.values()}.values():
        inside = set(members)
        if len(inside) > 1 and _shrinks(inside):
            found |= inside
    return frozenset(found)


def _shrinks(nodes: set[ir.Node]) -> bool:
    used = {value for node in nodes for value in node.inputs if value is not None and _constant(value) is not None}
    made = [value for node in nodes for value in node.outputs if value.name]
    freed_bytes = sum(_bytes_of(value) for value in used if not _is_needed_outside(value, nodes))
    left_bytes = sum(_bytes_of(value) for value in made if _is_needed_outside(value, nodes))
    # What lies between may be as large as what comes in.
    return left_bytes <= freed_bytes and all(_bytes_of(value) <= freed_bytes + MAX_GROWTH_BYTES for value in made)


def _is_needed_outside(value: ir.Value, nodes: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def _bytes_of(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        raise ValueError(f"'{value.name}' has no static shape.")
    return int((math.prod(value.shape.numpy()) * value.dtype.bitwidth + 7) // 8)


def _fold_node(node: ir.Node, graph: ir.Graph, model: ir.Model, budget: FoldingBudget | None) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    array = _static_shape_value(node)
    if array is not None:
        _replace(node, graph, [ir.Tensor(array)])
        return True
    if not _can_be_computed(node):
        return False
    tensors = [None if value is None else _constant(value) for value in node.inputs]
    if any(tensor is None and value is not None for tensor, value in zip(tensors, node.inputs, strict=True)):
        return False
    if budget is not None and not budget.allows(_growth_bytes(node)):
        return False
    results = _results(node, tensors, model)
    if results is None:
        return False
    _replace(node, graph, results)
    return True


def _widens_stored_weights(node: ir.Node) -> bool:
    """True for the Cast of weights that are stored in half precision: folding it would double the file again."""
    return node.op_type == "Cast" and _is_wider(node.outputs[0].dtype, node.inputs[0])


def _is_wider(dtype: ir.DataType | None, stored: ir.Value | None) -> bool:
    if dtype is None or stored is None or stored.dtype is None or stored.const_value is None:
        return False
    both_float = dtype.is_floating_point() and stored.dtype.is_floating_point()
    # Single numbers are settings (bounds, exponents): rules want to see them, and they weigh nothing.
    return both_float and dtype.bitwidth > stored.dtype.bitwidth and stored.const_value.size > 1


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value if value.is_initializer() and not value.is_graph_input() else None


def _replace(node: ir.Node, graph: ir.Graph, results: Sequence[ir.TensorProtocol]) -> None:
    for old, tensor in zip(node.outputs, results, strict=True):
        name = old.name
        new = ir.Value(name=None, const_value=tensor)
        hand_over(old, new)
        old.name = None
        new.name = name
        new.shape, new.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        if name:
            graph.register_initializer(new)
    graph.remove(node, safe=True)


# --- shapes that are known ------------------------------------------------------------------------------------


def _static_shape_value(node: ir.Node) -> npt.NDArray[np.int64] | None:
    """The value of Shape, Size, or of Gather and Slice on a Shape, as far as static dimensions say it."""
    if node.op_type in ("Shape", "Size"):
        dims = _shape_dims(node)
        if dims is None or not all(isinstance(dim, int) for dim in dims):
            return None
        sizes = [dim for dim in dims if isinstance(dim, int)]
        return np.array(math.prod(sizes) if node.op_type == "Size" else sizes, np.int64)
    if node.op_type not in ("Gather", "Slice") or node.inputs[0] is None:
        return None
    producer = node.inputs[0].producer()
    if producer is None or producer.op_type != "Shape" or producer.domain not in ("", "ai.onnx"):
        return None
    dims = _shape_dims(producer)
    if dims is None:
        return None
    # Pick positions instead of sizes, then look whether all that were picked are static.
    positions = _picked(node, np.arange(len(dims)))
    if positions is None:
        return None
    picked = [dims[int(position)] for position in positions.reshape(-1)]
    if not all(isinstance(dim, int) for dim in picked):
        return None
    return np.array(picked, np.int64).reshape(positions.shape)


def _shape_dims(node: ir.Node) -> Sequence[int | ir.SymbolicDim] | None:
    source = node.inputs[0]
    if source is None or source.shape is None or not isinstance(source.type, ir.TensorType):
        return None
    if node.op_type == "Size":
        return source.shape.dims
    start, end = node.attributes.get("start"), node.attributes.get("end")
    return source.shape.dims[(start.as_int() if start else 0) : (end.as_int() if end else None)]


def _picked(node: ir.Node, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    arrays = []
    for value in node.inputs[1:]:
        tensor = None if value is None else _constant(value)
        if tensor is None:
            return None
        arrays.append(tensor.numpy())
    if node.op_type == "Gather":
        indices = arrays[0]
        if indices.size and not -len(positions) <= indices.min() <= indices.max() < len(positions):
            return None
        return positions[indices.astype(np.int64)]
    starts, ends = arrays[0].reshape(-1), arrays[1].reshape(-1)
    steps = arrays[3].reshape(-1) if len(arrays) > 3 else np.ones(1, np.int64)
    if starts.size != 1 or ends.size != 1 or steps.size != 1 or steps[0] <= 0:
        return None
    return positions[int(starts[0]) : int(ends[0]) : int(steps[0])]


# --- bounds ---------------------------------------------------------------------------------------------------


def _can_be_computed(node: ir.Node) -> bool:
    """True for an operator, types and sizes that may be computed ahead, if all inputs are constants."""
    if node.domain not in ("", "ai.onnx") or (node.op_type not in _MOVES and node.op_type not in _ARITHMETIC):
        return False
    is_training = node.attributes.get_int("training_mode", 0) != 0
    if is_training or _widens_stored_weights(node):
        return False
    types = {value.dtype for value in node.inputs if value is not None}
    results = [value for value in node.outputs if value.name]
    if ir.DataType.STRING in types or not results:
        return False
    if any(value.shape is None or value.dtype is None or not value.shape.is_static() for value in results):
        return False
    if node.op_type in _ARITHMETIC:
        types.update(value.dtype for value in results)
        if node.op_type in ("Cast", "CastLike"):
            types -= {ir.DataType.FLOAT16}  # one rounding, as in every runtime
        if not types <= _ARITHMETIC_TYPES:
            return False
    if node.op_type == "MatMul" and node.inputs[0] is not None:
        left = node.inputs[0].shape
        inner = left.numpy()[-1:] if left is not None and left.is_static() else ()
        multiplications = math.prod(inner) * math.prod(results[0].shape.numpy() if results[0].shape else ())
        return multiplications <= _MAX_MULTIPLICATIONS
    return True


def _growth_bytes(node: ir.Node) -> int:
    """How much larger the results of `node` are than the constants that only it uses."""
    used = {value for value in node.inputs if value is not None}
    freed_bytes = sum(
        value.const_value.nbytes
        for value in used
        if value.const_value is not None and not _is_needed_outside(value, {node})
    )
    return sum(_bytes_of(value) for value in node.outputs if value.name) - freed_bytes


# --- evaluation -----------------------------------------------------------------------------------------------


def _results(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol | None], model: ir.Model
) -> list[ir.TensorProtocol] | None:
    evaluate = _evaluator(node, tensors, model)
    on_disk = any(isinstance(tensor, ir.LazyTensor) for tensor in tensors)
    dtype, shape = node.outputs[0].dtype, node.outputs[0].shape
    if (
        on_disk
        and node.op_type in _MOVES
        and len(node.outputs) == 1
        and dtype is not None
        and shape is not None
        and math.prod(shape.numpy()) * dtype.bitwidth > 8 * _KEEP_ON_DISK_ABOVE_BYTES
    ):

        def make() -> ir.Tensor[Any]:
            return ir.Tensor(evaluate()[0], dtype=dtype)

        return [ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape.numpy()))]
    try:
        arrays = evaluate()
    except _EVALUATION_ERRORS:
        # Not a fault of the model: the runtime will say what is wrong with the node, if anything is.
        return None
    results: list[ir.TensorProtocol] = []
    for value, array in zip(node.outputs, arrays, strict=False):
        if not isinstance(array, np.ndarray | np.generic) or value.dtype is None or value.shape is None:
            return None
        array = np.asarray(array)
        # The reference implementation must agree with inference, or one of them is wrong.
        if array.shape != tuple(value.shape.numpy()) or array.dtype != value.dtype.numpy():
            return None
        results.append(ir.Tensor(array, dtype=value.dtype))
    return results if len(results) == len(node.outputs) else None


def _evaluator(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol | None], model: ir.Model
) -> Callable[[], list[npt.NDArray[Any]]]:
    if node.op_type == "Div" and all(t is not None and t.dtype.is_integer() for t in tensors):
        first, second = tensors[0], tensors[1]
        return lambda: [_divide_integers(_array(first), _array(second))]
    proto = ir.serde.serialize_node(node)
    # Names in the one-node model are positions: the node's own may be empty or repeat.
    del proto.input[:], proto.output[:]
    proto.input.extend("" if tensor is None else f"i{index}" for index, tensor in enumerate(tensors))
    proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
    graph = onnx.helper.make_graph(
        [proto],
        "node",
        [onnx.helper.make_tensor_value_info(n, int(t.dtype), None) for n, t in _named(tensors)],
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in proto.output],
    )
    opset = onnx.helper.make_opsetid("", model.opset_imports[""])
    session = onnx.reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset]))
    checked = node.op_type in ("Cast", "CastLike")

    def evaluate() -> list[npt.NDArray[Any]]:
        feeds = {name: tensor.numpy() for name, tensor in _named(tensors)}
        if checked:
            _refuse_undefined_cast(feeds["i0"], node.outputs[0].dtype)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(session.run(None, feeds))

    return evaluate


def _named(tensors: Sequence[ir.TensorProtocol | None]) -> list[tuple[str, ir.TensorProtocol]]:
    return [(f"i{index}", tensor) for index, tensor in enumerate(tensors) if tensor is not None]


def _array(tensor: ir.TensorProtocol | None) -> npt.NDArray[Any]:
    if tensor is None:
        raise ValueError("a division needs two operands")
    return tensor.numpy()


def _divide_integers(numerator: npt.NDArray[Any], denominator: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Integer division that rounds toward zero, as runtimes do; the reference implementation rounds down."""
    if (denominator == 0).any():
        raise ZeroDivisionError("division by a constant zero is left to the runtime")
    quotient = np.floor_divide(numerator, denominator)
    if np.issubdtype(quotient.dtype, np.signedinteger):
        inexact = quotient * denominator != numerator
        quotient = quotient + (inexact & ((numerator < 0) != (denominator < 0)))
    return np.asarray(quotient, np.result_type(numerator, denominator))


def _refuse_undefined_cast(array: npt.NDArray[Any], dtype: ir.DataType | None) -> None:
    """Casting NaN, infinity or too large a number to an integer is undefined, and differs between machines."""
    if dtype is None or not dtype.is_integer() or not np.issubdtype(array.dtype, np.floating):
        return
    limits = np.iinfo(dtype.numpy())
    if array.size and not (np.isfinite(array).all() and limits.min <= array.min() and array.max() <= limits.max):
        raise ValueError("the cast is undefined")
