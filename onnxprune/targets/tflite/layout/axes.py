"""Which axes of an operator's tensors go together, and what reordering one tensor means for the others.

The axes of all data tensors of an operator are cut into *factors*: runs of neighbouring axes that stand for the same
thing at each port. In y(N, C, H, W) = RELU(x) there are four, each one axis at either port. In the RESHAPE of
(N, g*c, H, W) to (N, g, c, H, W) the second factor is one axis in front and two behind. A factor that a port lacks (the
reduced axis behind ARG_MAX) is an empty run there. Reordering an operator is reordering its factors: a permutation of
one tensor is possible where it keeps every run together and in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from onnxprune.targets.tflite.graph import Shape

__all__ = ["AxisMap", "Form", "Permutation", "Port", "Runs", "factor_reshape", "identity", "spread", "uniform"]

Permutation: TypeAlias = tuple[int, ...]
Runs: TypeAlias = tuple[tuple[int, ...], ...]
"""For each factor the axes that a port has of it."""


class Port(NamedTuple):
    """A place where an operator takes or gives a tensor."""

    is_output: bool
    position: int


def _any_order(order: tuple[int, ...]) -> bool:
    del order
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisMap:
    """The factors of an operator at each of its data ports; all list the same factors, in nominal order.

    `allows` says of an order of the factors whether the operator can be computed in it.
    """

    runs: Mapping[Port, Runs]
    allows: Callable[[tuple[int, ...]], bool] = _any_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """An operator computed with its factors in `order`; `permutations` are those of its data tensors."""

    order: tuple[int, ...]
    permutations: Mapping[Port, Permutation]


def identity(rank: int) -> Permutation:
    """The permutation that moves nothing."""
    return tuple(range(rank))


def uniform(ports: Sequence[Port], rank: int, allows: Callable[[tuple[int, ...]], bool] = _any_order) -> AxisMap:
    """All ports have the same axes, each of which can go its own way."""
    runs = tuple((axis,) for axis in range(rank))
    return AxisMap(runs=dict.fromkeys(ports, runs), allows=allows)


def spread(axes: AxisMap, port: Port, permutation: Permutation) -> Form | None:
    """The form in which the tensor at `port` is permuted like this; None where there is none, or nothing moves."""
    if port not in axes.runs:
        return None
    order = _order(axes.runs[port], permutation)
    if order is None or not axes.allows(order):
        return None
    permutations = {port: tuple(axis for factor in order for axis in runs[factor]) for port, runs in axes.runs.items()}
    if all(moved == identity(len(moved)) for moved in permutations.values()):
        return None
    return Form(order=order, permutations=permutations)


def _order(runs: Runs, permutation: Permutation) -> tuple[int, ...] | None:
    """The order of factors that gives `permutation`; those without axes here stay behind their nominal neighbour."""
    factor_of = {axis: factor for factor, run in enumerate(runs) for axis in run}
    if len(factor_of) != len(permutation):
        return None
    order: list[int] = []
    position = 0
    while position < len(permutation):
        factor = factor_of[permutation[position]]
        run = runs[factor]
        if permutation[position : position + len(run)] != run:
            return None
        order.append(factor)
        position += len(run)
    for factor, run in enumerate(runs):
        if not run:
            order.insert(order.index(factor - 1) + 1 if factor else 0, factor)
    return tuple(order)


def factor_reshape(before: Shape, after: Shape) -> tuple[Runs, Runs] | None:
    """The runs of axes that a RESHAPE turns into each other, each as short as can be; None where it can't be told.

    Axes of length 1 between runs are factors of their own. At most one dimension of each shape may be unknown.
    """
    sizes = _sizes(before, after)
    if sizes is None:
        return None
    long_before, long_after = ([axis for axis, size in enumerate(side) if size != _ONE] for side in sizes)
    groups = _groups([(axis, sizes[0][axis]) for axis in long_before], [(axis, sizes[1][axis]) for axis in long_after])
    if groups is None:
        return None
    factors: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    start_before = start_after = 0
    for left, right in groups:
        factors.extend(_unit_factors(range(start_before, left[0]), range(start_after, right[0])))
        # Axes of length 1 inside a run belong to it.
        factors.append((tuple(range(left[0], left[-1] + 1)), tuple(range(right[0], right[-1] + 1))))
        start_before, start_after = left[-1] + 1, right[-1] + 1
    factors.extend(_unit_factors(range(start_before, len(before)), range(start_after, len(after))))
    return tuple(one for one, _ in factors), tuple(other for _, other in factors)


class _Size(NamedTuple):
    """A length: `number`, times the unknown dimension where `unknowns` is 1."""

    number: Fraction
    unknowns: int = 0

    def times(self, other: _Size) -> _Size:
        return _Size(self.number * other.number, self.unknowns + other.unknowns)


_ONE = _Size(Fraction(1))


def _sizes(before: Shape, after: Shape) -> tuple[list[_Size], list[_Size]] | None:
    """The lengths of both sides in terms of one unknown, the one of `before`."""
    if 0 in before or 0 in after or before.count(-1) > 1 or after.count(-1) > 1:
        return None
    known_before, known_after = (_product([Fraction(dim) for dim in side if dim >= 0]) for side in (before, after))
    unknown_before, unknown_after = _Size(Fraction(1), 1), _Size(known_before / known_after, 1)
    if -1 not in before:
        unknown_after = _Size(known_before / known_after)
    elif -1 not in after:
        unknown_before = _Size(known_after / known_before)
    return (
        [unknown_before if dim < 0 else _Size(Fraction(dim)) for dim in before],
        [unknown_after if dim < 0 else _Size(Fraction(dim)) for dim in after],
    )


def _product(numbers: Sequence[Fraction]) -> Fraction:
    product = Fraction(1)
    for number in numbers:
        product *= number
    return product


def _groups(
    before: Sequence[tuple[int, _Size]], after: Sequence[tuple[int, _Size]]
) -> list[tuple[list[int], list[int]]] | None:
    """Shortest runs of both sides with equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    left, right = list(before), list(after)
    while left or right:
        if not left or not right:
            return None
        (first, size_left), (other, size_right) = left.pop(0), right.pop(0)
        axes_left, axes_right = [first], [other]
        while size_left != size_right:
            is_left_short = (size_left.unknowns, size_left.number) < (size_right.unknowns, size_right.number)
            side, axes = (left, axes_left) if is_left_short else (right, axes_right)
            if not side:
                return None
            axis, size = side.pop(0)
            axes.append(axis)
            if is_left_short:
                size_left = size_left.times(size)
            else:
                size_right = size_right.times(size)
        groups.append((axes_left, axes_right))
    return groups


def _unit_factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Axes of length 1 at the same place of both sides go together; the others come or go."""
    shared = min(len(before), len(after))
    return [
        *(((before[index],), (after[index],)) for index in range(shared)),
        *(((axis,), ()) for axis in before[shared:]),
        *(((), (axis,)) for axis in after[shared:]),
    ]
