"""`PERMUTABLE`: how operators are computed with their axes in another order, by kind.

A rule gives the axis map of an operator (None: its axes must stay) and what changes in it when its factors are
reordered. Data tensors are dealt with by whoever applies the rule; a rule changes what names axes: options, and
constants such as paddings. Kinds without a rule keep their axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxprune.targets.tflite.graph import Constant, OptionValue
from onnxprune.targets.tflite.layout.axes import AxisMap, Form, Permutation, Port, Runs, factor_reshape, uniform
from onnxprune.targets.tflite.layout.flatten import UNARY, Flattened
from onnxprune.targets.tflite.layout.flow import OperatorView

__all__ = ["PERMUTABLE", "Changes", "Rule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What becomes of an operator besides the order of its data tensors."""

    options: Mapping[str, OptionValue] = field(default_factory=dict)
    constants: Mapping[int, Constant] = field(default_factory=dict)
    """New numbers of constant inputs, by position."""
    elsewhere: Mapping[tuple[int, int], Constant] = field(default_factory=dict)
    """The same of other operators: (place in the graph, position)."""
    take: tuple[int, ...] = ()
    """Where not empty: the output must be gathered by these indices along its only axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One kind's axes and changes."""

    axes: Callable[[OperatorView], AxisMap | None]
    permute: Callable[[OperatorView, Form], Changes]


def _nothing(view: OperatorView, form: Form) -> Changes:
    del view, form
    return Changes()


def _input(position: int) -> Port:
    return Port(is_output=False, position=position)


_OUTPUT = Port(is_output=True, position=0)


# --- elementwise --------------------------------------------------------------------------------------------------


def _elementwise(view: OperatorView) -> AxisMap | None:
    """Inputs that broadcast. Constants of lower rank and tensors of one element fit any order."""
    rank = view.output().rank
    ports = []
    for position in range(len(view.operator.inputs)):
        if not view.has(position):
            continue
        tensor = view.input(position)
        if tensor.is_static and tensor.num_elements == 1 and tensor.rank <= rank:
            continue
        if tensor.rank == rank:
            ports.append(_input(position))
        elif view.constant(position) is None or (tensor.quantization is not None and tensor.quantization.is_per_axis):
            return None
    return uniform([*ports, *view.outputs()], rank)


def _lifted_constants(view: OperatorView, form: Form) -> Changes:
    """Constants of lower rank get the rank of the others before they are reordered."""
    order, rank = form.order, len(form.order)
    constants = {}
    for position in range(len(view.operator.inputs)):
        constant = view.constant(position)
        if constant is None or _input(position) in form.permutations or len(constant.shape) == 0:
            continue
        if np.prod(constant.shape) != 1:
            constants[position] = constant.reshaped((1,) * (rank - len(constant.shape)) + constant.shape).transposed(
                order
            )
    return Changes(constants=constants)


# --- an axis, or several, in an option ----------------------------------------------------------------------------


def _from_front(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _concatenation(view: OperatorView) -> AxisMap | None:
    inputs = [_input(position) for position in range(len(view.operator.inputs))]
    return uniform([*inputs, _OUTPUT], view.output().rank)


def _concatenation_permuted(view: OperatorView, form: Form) -> Changes:
    axis = _from_front(view.operator.option("axis", 0), len(form.order))
    return Changes(options={"axis": form.order.index(axis)})


def _last_stays(view: OperatorView) -> AxisMap | None:
    rank = view.output().rank
    return uniform([_input(0), *view.outputs()], rank, lambda order: order[-1] == rank - 1)


def _fully_connected(view: OperatorView) -> AxisMap | None:
    """Rows are independent where their axes are kept."""
    if not view.operator.option("keepNumDims", 0):
        return None
    return _last_stays(view)


def _matrix_product(view: OperatorView) -> AxisMap | None:
    """Products of a batch are independent."""
    rank = view.output().rank
    if view.input(0).rank != rank or view.input(1).rank != rank:
        return None
    return uniform([_input(0), _input(1), _OUTPUT], rank, lambda order: order[-2:] == (rank - 2, rank - 1))


def _pack(view: OperatorView) -> AxisMap | None:
    """Each input is one index of the new axis."""
    rank = view.output().rank
    axis = _from_front(view.operator.option("axis", 0), rank)
    return _with_axis([_input(position) for position in range(len(view.operator.inputs))], [_OUTPUT], axis, rank)


def _unpack(view: OperatorView) -> AxisMap | None:
    """Each output is one index of the axis."""
    rank = view.input(0).rank
    axis = _from_front(view.operator.option("axis", 0), rank)
    return _with_axis(view.outputs(), [_input(0)], axis, rank)


def _with_axis(without: Sequence[Port], with_axis: Sequence[Port], axis: int, rank: int) -> AxisMap:
    """The ports of `without` lack `axis` of the others."""
    lacking = _without_axes(rank, {axis})
    full: Runs = tuple((one,) for one in range(rank))
    return AxisMap(runs={**dict.fromkeys(without, lacking), **dict.fromkeys(with_axis, full)})


def _without_axes(rank: int, missing: set[int]) -> Runs:
    """A factor for each of `rank` axes, those of `missing` empty."""
    kept = [axis for axis in range(rank) if axis not in missing]
    return tuple((kept.index(axis),) if axis in kept else () for axis in range(rank))


def _pack_permuted(view: OperatorView, form: Form) -> Changes:
    rank = len(form.order)
    return Changes(options={"axis": form.order.index(_from_front(view.operator.option("axis", 0), rank))})


def _gather(view: OperatorView) -> AxisMap | None:
    """The axis becomes those of the indices, which keep their order."""
    if view.operator.option("batchDims", 0):
        return None
    rank, added = view.input(0).rank, view.input(1).rank
    axis = _from_front(view.operator.option("axis", 0), rank)
    behind = tuple(
        tuple(range(axis, axis + added)) if one == axis else (one if one < axis else one - 1 + added,)
        for one in range(rank)
    )
    # Rows are copied whole where the last axis is not the gathered one: it must not become it.
    return AxisMap(
        runs={_input(0): tuple((one,) for one in range(rank)), _OUTPUT: behind},
        allows=lambda order: order[-1] != axis or axis == rank - 1,
    )


def _gather_permuted(view: OperatorView, form: Form) -> Changes:
    rank = view.input(0).rank
    axis = _from_front(view.operator.option("axis", 0), rank)
    return Changes(options={"axis": form.permutations[_input(0)].index(axis)})


def _squeeze(view: OperatorView) -> AxisMap | None:
    rank = view.input(0).rank
    dropped = _squeezed(view)
    return AxisMap(runs={_input(0): tuple((axis,) for axis in range(rank)), _OUTPUT: _without_axes(rank, set(dropped))})


def _squeezed(view: OperatorView) -> list[int]:
    shape = view.input(0).shape
    named: tuple[int, ...] = view.operator.option("squeezeDims", ())
    return [_from_front(axis, len(shape)) for axis in named] or [axis for axis, dim in enumerate(shape) if dim == 1]


def _squeeze_permuted(view: OperatorView, form: Form) -> Changes:
    moved = form.permutations[_input(0)]
    return Changes(options={"squeezeDims": tuple(sorted(moved.index(axis) for axis in _squeezed(view)))})


# --- axes in a constant -------------------------------------------------------------------------------------------


def _axes_input(position: int, data: int = 0) -> Rule:
    """Axes named by a constant input stay, under new numbers."""

    def axes(view: OperatorView) -> AxisMap | None:
        if view.integers(position) is None:
            return None
        return uniform([_input(data), *view.outputs()], view.input(data).rank)

    def permute(view: OperatorView, form: Form) -> Changes:
        return Changes(constants={position: _renumbered(view, position, form.order)})

    return Rule(axes=axes, permute=permute)


def _renumbered(view: OperatorView, position: int, order: Permutation) -> Constant:
    named = view.constant(position)
    assert named is not None  # noqa: S101 - the axis map says so
    return named.mapped(
        lambda axes: np.array(
            [order.index(_from_front(int(axis), len(order))) for axis in axes.reshape(-1)], axes.dtype
        ).reshape(axes.shape)
    )


def _reduction(view: OperatorView) -> AxisMap | None:
    """Axes of length 1 stay behind, or none."""
    named = view.integers(1)
    if named is None:
        return None
    rank = view.input(0).rank
    if view.operator.option("keepDims", 0):
        return uniform([_input(0), _OUTPUT], rank)
    reduced = {_from_front(axis, rank) for axis in named}
    return AxisMap(runs={_input(0): tuple((axis,) for axis in range(rank)), _OUTPUT: _without_axes(rank, reduced)})


def _reduction_permuted(view: OperatorView, form: Form) -> Changes:
    moved = form.permutations[_input(0)]
    named = view.constant(1)
    assert named is not None  # noqa: S101 - the axis map says so
    order = sorted(moved.index(_from_front(int(axis), len(moved))) for axis in named.array().reshape(-1))
    return Changes(constants={1: Constant.of(np.array(order, named.dtype).reshape(named.shape))})


def _expand_dims(view: OperatorView) -> AxisMap | None:
    named = view.integers(1)
    if named is None:
        return None
    rank = view.output().rank
    return _with_axis([_input(0)], [_OUTPUT], _from_front(named[0], rank), rank)


# --- a number for each axis in a constant -------------------------------------------------------------------------


def _per_axis(*positions: int) -> Rule:
    """Constant inputs with a number, or a row, for each axis: paddings, multiples, begins and sizes."""

    def axes(view: OperatorView) -> AxisMap | None:
        rank = view.output().rank
        if view.input(0).rank != rank or any(view.constant(position) is None for position in positions):
            return None
        return uniform([_input(0), _OUTPUT], rank)

    def permute(view: OperatorView, form: Form) -> Changes:
        order = list(form.order)
        constants = {}
        for position in positions:
            constant = view.constant(position)
            assert constant is not None  # noqa: S101 - the axis map says so
            constants[position] = constant.mapped(lambda rows: np.ascontiguousarray(rows[order]))
        return Changes(constants=constants)

    return Rule(axes=axes, permute=permute)


_MASKS = ("beginMask", "endMask", "shrinkAxisMask")


def _strided_slice(view: OperatorView) -> AxisMap | None:
    """Slices with a number for each axis; axes that the shrink mask names go away."""
    rank = view.input(0).rank
    option = view.operator.option
    if option("newAxisMask", 0) or option("ellipsisMask", 0) or option("offset", 0):
        return None
    vectors = [view.integers(position) for position in (1, 2, 3)]
    if any(vector is None or len(vector) > rank for vector in vectors):
        return None
    shrunk = {axis for axis in range(rank) if option("shrinkAxisMask", 0) >> axis & 1}
    return AxisMap(runs={_input(0): tuple((axis,) for axis in range(rank)), _OUTPUT: _without_axes(rank, shrunk)})


def _strided_slice_permuted(view: OperatorView, form: Form) -> Changes:
    moved = form.permutations[_input(0)]
    rank = len(moved)
    given = len(view.integers(1) or ())
    # Axes behind the vectors are taken whole.
    whole = sum(1 << axis for axis in range(given, rank))
    masks = {mask: view.operator.option(mask, 0) | (0 if mask == "shrinkAxisMask" else whole) for mask in _MASKS}
    constants = {}
    for position, missing in ((1, 0), (2, 0), (3, 1)):
        vector = (*(view.integers(position) or ()), *(missing,) * (rank - given))
        constants[position] = Constant.of(np.array([vector[axis] for axis in moved], np.int32))
    return Changes(
        options={
            mask: sum((bits >> axis & 1) << place for place, axis in enumerate(moved)) for mask, bits in masks.items()
        },
        constants=constants,
    )


# --- shapes -------------------------------------------------------------------------------------------------------


def _shape_permuted(view: OperatorView, form: Form) -> Changes:
    """SHAPE of a reordered tensor, brought back into order."""
    del view
    moved = form.permutations[_input(0)]
    return Changes(take=tuple(moved.index(axis) for axis in range(len(moved))))


def _shape(view: OperatorView) -> AxisMap | None:
    rank = view.input(0).rank
    return AxisMap(runs={_input(0): tuple((axis,) for axis in range(rank))})


# --- reshapes -----------------------------------------------------------------------------------------------------


def _reshape(view: OperatorView) -> AxisMap | None:
    """Runs of axes that become runs of axes; any order of axes that a constant weight can follow."""
    if view.has(1) and view.constant(1) is None:
        return None
    if view.output().shape.count(-1) > 1:
        return None
    flattened = Flattened.of(view)
    if flattened is not None:
        return flattened.axis_map()
    factored = factor_reshape(view.input(0).shape, view.output().shape)
    if factored is None:
        return None
    return AxisMap(runs={_input(0): factored[0], _OUTPUT: factored[1]})


def _reshape_permuted(view: OperatorView, form: Form) -> Changes:
    flattened = Flattened.of(view)
    if flattened is not None:
        return Changes(elsewhere=flattened.weights(form))
    shape = tuple(view.output().shape[axis] for axis in form.permutations[_OUTPUT])
    return Changes(options={"newShape": shape}, constants={1: Constant.of(np.array(shape, np.int32))})


_BROADCASTING = (
    "ADD", "ADD_N", "ATAN2", "BITWISE_XOR", "DIV", "EQUAL", "FLOOR_DIV", "FLOOR_MOD", "GREATER", "GREATER_EQUAL",
    "LESS", "LESS_EQUAL", "LOGICAL_AND", "LOGICAL_OR", "MAXIMUM", "MINIMUM", "MUL", "NOT_EQUAL", "POW", "PRELU",
    "RIGHT_SHIFT", "SELECT_V2", "SQUARED_DIFFERENCE", "SUB",
)  # fmt: skip
_REDUCTIONS = ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ALL", "REDUCE_ANY")

PERMUTABLE: Mapping[str, Rule] = {
    **dict.fromkeys((*UNARY, *_BROADCASTING), Rule(axes=_elementwise, permute=_lifted_constants)),
    **dict.fromkeys(_REDUCTIONS, Rule(axes=_reduction, permute=_reduction_permuted)),
    **dict.fromkeys(("ARG_MAX", "ARG_MIN"), Rule(axes=_reduction, permute=_reduction_permuted)),
    **dict.fromkeys(("SOFTMAX", "LOG_SOFTMAX", "L2_NORMALIZATION"), Rule(axes=_last_stays, permute=_nothing)),
    **dict.fromkeys(("PAD", "PADV2", "MIRROR_PAD", "TILE"), _per_axis(1)),
    "BROADCAST_TO": _per_axis(1),
    "SLICE": _per_axis(1, 2),
    "CUMSUM": _axes_input(1),
    "REVERSE_V2": _axes_input(1),
    "SPLIT": _axes_input(0, data=1),
    "SPLIT_V": _axes_input(2),
    "CONCATENATION": Rule(axes=_concatenation, permute=_concatenation_permuted),
    "PACK": Rule(axes=_pack, permute=_pack_permuted),
    "UNPACK": Rule(axes=_unpack, permute=_pack_permuted),
    "GATHER": Rule(axes=_gather, permute=_gather_permuted),
    "TOPK_V2": Rule(axes=_last_stays, permute=_nothing),
    "EXPAND_DIMS": Rule(
        axes=_expand_dims, permute=lambda view, form: Changes(constants={1: _renumbered(view, 1, form.order)})
    ),
    "SQUEEZE": Rule(axes=_squeeze, permute=_squeeze_permuted),
    "STRIDED_SLICE": Rule(axes=_strided_slice, permute=_strided_slice_permuted),
    "FULLY_CONNECTED": Rule(axes=_fully_connected, permute=_nothing),
    "BATCH_MATMUL": Rule(axes=_matrix_product, permute=_nothing),
    "RESHAPE": Rule(axes=_reshape, permute=_reshape_permuted),
    "SHAPE": Rule(axes=_shape, permute=_shape_permuted),
}
"""Rules by kind."""
