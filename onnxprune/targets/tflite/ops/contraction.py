"""Products of matrices: Gemm, MatMul and Einsum through one function, `product`.

FULLY_CONNECTED multiplies by a constant matrix, which is stored (units, inputs); BATCH_MATMUL multiplies two tensors
whose leading axes broadcast.
"""

from __future__ import annotations

import math

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError, broadcast_shape
from onnxprune.targets.tflite.graph import Constant, Tensor
from onnxprune.targets.tflite.ops.sizes import reshaped_to, size_of, slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

__all__ = ["linear", "product", "scaled"]

# LiteRT's BATCH_MATMUL broadcasts over at most three leading axes.
_MAX_RANK = 5
# The largest matrix whose determinant is expanded: the number of products doubles with each row.
_MAX_DETERMINANT = 4


@TFLITE.register("Gemm")
def gemm(node: NodeView, build: Builder) -> Tensor:
    """A product and a bias. alpha and beta go into constants where they meet one."""
    left, right, bias = node.input(0), node.input(1), node.optional(2)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    if left.type != "FLOAT32" and not (alpha.is_integer() and beta.is_integer()):
        raise UnsupportedError(f"alpha {alpha} and beta {beta} of integers")
    if node.integer("transA"):
        left = build.transposed(left, (1, 0))
    if right.constant is not None:
        right, alpha = scaled(build, right, alpha), 1.0
    units = right.shape[0 if node.integer("transB") else 1]
    if beta == 0.0:
        bias = None
    elif bias is not None:
        bias = scaled(build, bias, beta)
    fits = alpha == 1.0 and left.type == "FLOAT32" and right.constant is not None
    vector = _bias_vector(build, bias, units) if bias is not None and fits else None
    y = product(build, left, right, is_right_transposed=bool(node.integer("transB")), bias=vector)
    y = scaled(build, y, alpha)
    return y if bias is None or vector is not None else build.binary("ADD", y, bias)


@TFLITE.register("MatMul")
def matmul(node: NodeView, build: Builder) -> Tensor:
    """A product; a vector counts as a row on the left, and as a column on the right."""
    left, right = node.input(0), node.input(1)
    is_row, is_column = left.rank == 1, right.rank == 1
    if is_row:
        left = build.reshaped(left, (1, *left.shape))
    if is_column:
        right = build.reshaped(right, (*right.shape, 1))
    y = product(build, left, right)
    if not (is_row or is_column):
        return y
    dropped = {y.rank - 2} if is_row else set()
    dropped.update({y.rank - 1} if is_column else ())
    return reshaped_to(build, y, [size_of(y, axis) for axis in range(y.rank) if axis not in dropped])


@TFLITE.register("Det")
def det(node: NodeView, build: Builder) -> Tensor:
    """Expansion by rows from the last one up: minors of r rows from those of r - 1, for every choice of columns."""
    x = node.input(0)
    order = x.shape[-1]
    if not 1 <= order <= _MAX_DETERMINANT or x.shape[-2] != order:
        raise UnsupportedError(
            f"TFLite factorizes no matrices, and only determinants of up to {_MAX_DETERMINANT} rows are expanded"
        )
    rows = [slice_of(build, x, -2, row, 1) for row in range(order)]
    entries = [[slice_of(build, row, -1, column, 1) for column in range(order)] for row in rows]
    minors: dict[tuple[int, ...], Tensor] = {(column,): entries[-1][column] for column in range(order)}
    for row in range(order - 2, -1, -1):
        wider = {}
        for columns in {(*chosen, more) for chosen in minors for more in range(chosen[-1] + 1, order)}:
            total = build.binary("MUL", entries[row][columns[0]], minors[columns[1:]])
            for place, column in enumerate(columns[1:], start=1):
                term = build.binary("MUL", entries[row][column], minors[columns[:place] + columns[place + 1 :]])
                total = build.binary("SUB" if place % 2 else "ADD", total, term)
            wider[columns] = total
        minors = wider
    (whole,) = minors.values()
    return reshaped_to(build, whole, [size_of(x, axis) for axis in range(x.rank - 2)])


def scaled(build: Builder, tensor: Tensor, factor: float) -> Tensor:
    """`tensor` times a number, at once where it is constant."""
    if factor == 1.0:
        return tensor
    if tensor.constant is None:
        number = build.constant(np.array(factor, np.float32))
        return build.binary("MUL", tensor, number if tensor.type == "FLOAT32" else build.cast(number, tensor.type))
    kept = tensor.constant.mapped(lambda array: (array * array.dtype.type(factor)).astype(array.dtype, copy=False))
    return build.constant_tensor(kept, name=f"{tensor.name}/scaled")


def product(
    build: Builder, left: Tensor, right: Tensor, *, is_right_transposed: bool = False, bias: Tensor | None = None
) -> Tensor:
    """The product of the last two axes, for all leading ones, which broadcast; both have rank 2 at least.

    Args:
        build: Gets the operators.
        left: (..., m, k).
        right: (..., k, n), or (..., n, k) when `is_right_transposed`.
        is_right_transposed: See `right`.
        bias: (n,) float32, only with a constant `right` of one matrix.
    """
    if left.type != "FLOAT32":
        return _integer_product(build, left, right, is_right_transposed=is_right_transposed)
    if right.constant is not None and math.prod(right.shape[:-2]) == 1 and left.rank >= right.rank:
        matrix = build.reshaped(right, right.shape[-2:])
        return linear(build, left, matrix if is_right_transposed else build.transposed(matrix, (1, 0)), bias)
    if not is_right_transposed:
        right, is_right_transposed = _without_transpose(build, right)
    shape = _product_shape(left, right, is_right_transposed=is_right_transposed)
    # adjX would say the same of the left side; XNNPACK leaves such operators alone.
    if max(left.rank, right.rank) <= _MAX_RANK:
        return build.op("BATCH_MATMUL", [left, right], shape=shape, type_=left.type, adjY=is_right_transposed)
    left, right = (_with_one_batch_axis(build, one, shape[:-2]) for one in (left, right))
    flat = (*broadcast_shape(left.shape[:1], right.shape[:1]), *shape[-2:])
    y = build.op("BATCH_MATMUL", [left, right], shape=flat, type_=left.type, adjY=is_right_transposed)
    return build.reshaped(y, shape)


def linear(build: Builder, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """FULLY_CONNECTED over the last axis: `weight` is (units, inputs), constant or not; `bias` (units,)."""
    if x.shape[-1] >= 0 and x.shape[-1] != weight.shape[1]:
        raise UnsupportedError(f"a row of {x.shape[-1]} numbers meets a matrix of {weight.shape[1]}")
    shape = (*x.shape[:-1], weight.shape[0])
    return build.op("FULLY_CONNECTED", [x, weight, bias], shape=shape, type_=x.type, keepNumDims=x.rank != 2)


def _bias_vector(build: Builder, bias: Tensor, units: int) -> Tensor | None:
    """`bias` as the constant vector that FULLY_CONNECTED takes; None where it differs between rows."""
    if bias.constant is None or math.prod(bias.shape[:-1]) != 1:
        return None
    given = bias.constant
    if bias.shape == (units,):
        return bias
    vector = Constant((units,), given.dtype, lambda: np.broadcast_to(given.load().reshape(-1), (units,)).copy())
    return build.constant_tensor(vector, name=f"{bias.name}/vector")


def _without_transpose(build: Builder, right: Tensor) -> tuple[Tensor, bool]:
    """(the operand, is it transposed): what stands before a TRANSPOSE that BATCH_MATMUL can do itself.

    A TRANSPOSE that also reorders leading axes becomes one that keeps rows together, which moves memory in larger
    pieces.
    """
    producer = build.producer(right)
    if producer is None or producer.kind != "TRANSPOSE":
        return right, False
    order = build.tensors[producer.inputs[1]].array()
    if order is None or order[-2] != right.rank - 1:
        return right, False
    axes = tuple(range(right.rank))
    return build.transposed(right, (*axes[:-2], axes[-1], axes[-2])), True


def _product_shape(left: Tensor, right: Tensor, *, is_right_transposed: bool) -> tuple[int, ...]:
    inner, columns = (right.shape[-1], right.shape[-2]) if is_right_transposed else right.shape[-2:]
    if left.shape[-1] >= 0 and inner >= 0 and left.shape[-1] != inner:
        raise UnsupportedError(f"shapes {list(left.shape)} and {list(right.shape)} can't be multiplied")
    leading = (left.shape[:-2], right.shape[:-2])
    return (*(broadcast_shape(*leading) if any(leading) else ()), left.shape[-2], columns)


def _with_one_batch_axis(build: Builder, tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    own = tensor.shape[:-2]
    if math.prod(own) != 1 and own != batch:
        raise UnsupportedError(
            f"BATCH_MATMUL takes {_MAX_RANK} axes, and the leading ones, {list(own)} and {list(batch)}, can't be joined"
        )
    return build.reshaped(tensor, (-1 if -1 in own else math.prod(own), *tensor.shape[-2:]))


def _integer_product(build: Builder, left: Tensor, right: Tensor, *, is_right_transposed: bool) -> Tensor:
    """All products of numbers, and their sums: LiteRT multiplies no matrices of wide integers."""
    if left.type not in ("INT32", "INT64"):
        raise UnsupportedError(f"LiteRT has no product of {left.type} numbers")
    rank = max(left.rank, right.rank)
    left, right = build.with_rank(left, rank), build.with_rank(right, rank)
    if not is_right_transposed:
        right = build.transposed(right, (*range(rank - 2), rank - 1, rank - 2))
    # (..., m, 1, k) * (..., 1, n, k)
    left = reshaped_to(build, left, [*(size_of(left, a) for a in range(rank - 1)), 1, size_of(left, -1)])
    right = reshaped_to(
        build, right, [*(size_of(right, a) for a in range(rank - 2)), 1, *(size_of(right, a) for a in (-2, -1))]
    )
    products = build.binary("MUL", left, right)
    return build.op("SUM", [products, build.constant([rank])], shape=products.shape[:-1], type_=left.type)
