"""Einsum: operands two by two, each pair as one product of matrices where it sums over anything.

Labels are those of the equation; the axes that "..." stands for are labelled "0", "1", ... counted from the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.contraction import linear, product
from onnxprune.targets.tflite.ops.sizes import Size, product_of, reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

__all__: list[str] = []


@dataclass(frozen=True, slots=True)
class Labelled:
    """A tensor whose axes have names, each of which occurs once."""

    tensor: Tensor
    labels: str

    def size(self, label: str) -> Size:
        """A dimension by its name."""
        return size_of(self.tensor, self.labels.index(label))


@TFLITE.register("Einsum")
def einsum(node: NodeView, build: Builder) -> Tensor:
    """Products from the left to the right; a label is summed as soon as nobody needs it any more."""
    tensors = [node.input(position) for position in range(len(node.inputs))]
    terms, result = _parsed(node.text("equation"), [tensor.rank for tensor in tensors])
    operands = [_without_repetition(build, tensor, term) for tensor, term in zip(tensors, terms, strict=True)]
    operands = [_without_units(build, one) for one in operands]
    found = operands[0]
    for position, other in enumerate(operands[1:], start=1):
        needed = set(result).union(*(later.labels for later in operands[position + 1 :]))
        found = _joined(build, found, other, needed)
    found = _summed(build, found, set(result))
    order = [found.labels.index(label) for label in result if label in found.labels]
    y = build.transposed(found.tensor, order)
    if set(found.labels) == set(result):
        return y
    # Labels that are 1 everywhere were dropped on the way.
    sizes = [found.size(label) if label in found.labels else 1 for label in result]
    return reshaped_to(build, y, sizes)


def _parsed(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Labels of every operand and of the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise UnsupportedError(f"equation '{equation}' is of {len(terms)} operands, and {len(ranks)} are given")
    covered = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(count < 0 or (count > 0 and "..." not in term) for term, count in zip(terms, covered, strict=True)):
        raise UnsupportedError(f"equation '{equation}' does not fit operands of {ranks} axes")
    digits = "9876543210"
    widest = max((count for term, count in zip(terms, covered, strict=True) if "..." in term), default=0)
    expanded = [
        term.replace("...", digits[len(digits) - count :] if count else "")
        for term, count in zip(terms, covered, strict=True)
    ]
    ellipsis_ = digits[len(digits) - widest :] if widest else ""
    if arrow:
        return expanded, right.replace("...", ellipsis_)
    letters = [letter for letter in left if letter.isalpha()]
    return expanded, ellipsis_ + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))


def _without_repetition(build: Builder, tensor: Tensor, labels: str) -> Labelled:
    """The diagonal of axes that bear the same name: every (n + 1)-th number of n * n."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            first = labels.index(label)
            second = labels.index(label, first + 1)
            size = tensor.shape[first]
            if size < 0 or tensor.shape[second] != size:
                raise UnsupportedError(f"the diagonal of axes of {size} and {tensor.shape[second]} entries")
            others = [axis for axis in range(tensor.rank) if axis not in (first, second)]
            tensor = build.transposed(tensor, (*others, first, second))
            kept = [size_of(tensor, axis) for axis in range(len(others))]
            tensor = reshaped_to(build, tensor, [*kept, size * size])
            steps = [*(1 for _ in kept), size + 1]
            tensor = build.op(
                "STRIDED_SLICE",
                [tensor, *(build.constant(row) for row in ([0] * len(steps), [0] * len(steps), steps))],
                shape=(*tensor.shape[:-1], size),
                type_=tensor.type,
                beginMask=(1 << len(steps)) - 1,
                endMask=(1 << len(steps)) - 1,
            )
            labels = "".join(labels[axis] for axis in others) + label
    return Labelled(tensor, labels)


def _without_units(build: Builder, operand: Labelled) -> Labelled:
    """Without axes of length 1 that broadcast, or that are 1 everywhere."""
    dims = zip(operand.labels, operand.tensor.shape, strict=True)
    kept = "".join(label for label, dim in dims if dim != 1)
    if kept == operand.labels:
        return operand
    return Labelled(reshaped_to(build, operand.tensor, [operand.size(label) for label in kept]), kept)


def _summed(build: Builder, operand: Labelled, needed: set[str]) -> Labelled:
    """Without the labels that nobody needs."""
    axes = [axis for axis, label in enumerate(operand.labels) if label not in needed]
    if not axes:
        return operand
    kept = "".join(label for label in operand.labels if label in needed)
    shape = tuple(operand.tensor.shape[operand.labels.index(label)] for label in kept)
    x = operand.tensor
    return Labelled(build.op("SUM", [x, build.constant(axes)], shape=shape, type_=x.type), kept)


def _joined(build: Builder, left: Labelled, right: Labelled, needed: set[str]) -> Labelled:
    """The product of two operands, summed over what neither the result nor a later operand needs."""
    left = _summed(build, left, needed.union(right.labels))
    right = _summed(build, right, needed.union(left.labels))
    shared = [label for label in left.labels if label in right.labels]
    summed = "".join(label for label in shared if label not in needed)
    batch = "".join(label for label in shared if label in needed)
    rows = "".join(label for label in left.labels if label not in shared)
    columns = "".join(label for label in right.labels if label not in shared)
    labels = batch + rows + columns
    if not summed or not (rows or columns):
        aligned = [_aligned(build, one, labels + summed) for one in (left, right)]
        return _summed(build, Labelled(build.binary("MUL", *aligned), labels + summed), needed)
    if not batch and right.tensor.constant is not None and left.tensor.type == "FLOAT32":
        x = _grouped(build, left, [*(rows or [""]), summed])
        y = linear(build, x, _grouped(build, right, [columns, summed]))
        is_whole = len(rows) >= 1 and len(columns) == 1
    else:
        is_transposed = right.labels.endswith(summed)
        groups = [*batch, columns, summed] if is_transposed else [*batch, summed, columns]
        x = _grouped(build, left, [*batch, rows, summed])
        y = product(build, x, _grouped(build, right, groups), is_right_transposed=is_transposed)
        is_whole = len(rows) == len(columns) == 1
    sizes = [*(left.size(label) for label in batch + rows), *(right.size(label) for label in columns)]
    return Labelled(y if is_whole else reshaped_to(build, y, sizes), labels)


def _aligned(build: Builder, operand: Labelled, labels: str) -> Tensor:
    """With the axes of `labels` in that order, of length 1 where it has none."""
    order = [operand.labels.index(label) for label in labels if label in operand.labels]
    ordered = build.transposed(operand.tensor, order)
    sizes = [operand.size(label) if label in operand.labels else 1 for label in labels]
    return ordered if len(order) == len(labels) else reshaped_to(build, ordered, sizes)


def _grouped(build: Builder, operand: Labelled, groups: list[str]) -> Tensor:
    """One axis for each group of labels, in that order."""
    order = [operand.labels.index(label) for group in groups for label in group]
    ordered = build.transposed(operand.tensor, order)
    if all(len(group) == 1 for group in groups):
        return ordered
    return reshaped_to(build, ordered, [product_of([operand.size(label) for label in group]) for group in groups])
