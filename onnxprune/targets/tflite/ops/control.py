"""If, Loop and Scan: IF and WHILE, with bodies of their own.

A body reads nothing from outside but constants: what it captures becomes an input, for IF of both branches and for
WHILE a part of its state that stays the same. The state of a WHILE, in order:

    index, INT32          how often it ran
    [limit, INT32]        how often it may run, where that is computed
    [condition, BOOL]     where it may stop for another reason
    carried values
    values that stay the same
    rows                  of each scan output: (trips, ...) where trips are known; else (1 + trips so far, ...), of
                          which the first row is nothing (LiteRT can't pass a tensor without elements)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import NUMPY_TYPES, Shape, Tensor
from onnxprune.targets.tflite.ops.indexing import gathered, sliced
from onnxprune.targets.tflite.ops.shaping import concatenated
from onnxprune.targets.tflite.ops.table import TFLITE, Body, NodeView

_INT32_MAX = int(np.iinfo(np.int32).max)


@TFLITE.register("If")
def if_(node: NodeView, build: Builder) -> Sequence[Tensor]:
    """IF; the branch itself where the condition is constant."""
    condition = node.input(0)
    branches = [node.body("then_branch"), node.body("else_branch")]
    if condition.constant is not None:
        return node.scope.nodes(branches[0 if condition.constant.array().any() else 1], [])
    captured = node.scope.captured(node.node)
    made: list[int] = []
    results: list[list[Tensor]] = []
    for branch, name in zip(branches, ("then", "else"), strict=True):
        body = node.scope.body(f"{node.node.name}/{name}")
        body.capture(captured)
        results.append(_outputs(body, body.nodes(branch, [])))
        made.append(body.finish(results[-1]))
    outputs = [(_either(then.shape, other.shape), then.type) for then, other in zip(*results, strict=True)]
    return build.ops(
        "IF",
        [build.scalar(condition), *captured.values()],
        outputs=outputs,
        thenSubgraphIndex=made[0],
        elseSubgraphIndex=made[1],
    )


def _outputs(body: Body, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each with an operator behind it, and none twice."""
    found: list[Tensor] = []
    for tensor in tensors:
        is_fit = body.build.producer(tensor) is not None and tensor not in found
        found.append(tensor if is_fit else body.build.copied(tensor))
    return found


def _either(one: Shape, other: Shape) -> Shape:
    if len(one) != len(other):
        raise UnsupportedError(f"its result has {len(one)} axes or {len(other)}, and TFLite needs to know how many")
    return tuple(left if left == right else -1 for left, right in zip(one, other, strict=True))


@TFLITE.register("Loop")
def loop(node: NodeView, build: Builder) -> Sequence[Tensor]:
    """WHILE."""
    graph = node.body("body")
    trips, first = node.optional(0), node.optional(1)
    initial = [node.input(position) for position in range(2, len(node.inputs))]
    if first is not None and first.constant is not None:
        if not first.constant.array().any():
            raise UnsupportedError("its condition is false from the start")
        first = None
    may_stop = not _stays_true(graph)
    condition = None
    if first is not None or may_stop:
        condition = build.constant(np.ones((), np.bool_)) if first is None else build.scalar(first)
    limit = _limit(build, trips)
    if limit is None and condition is None:
        raise UnsupportedError("it has no end")

    def step(body: Body, state: _State) -> _Step:
        number = body.build.cast(state.index, "INT64")
        if (graph.inputs[0].shape or ()) != ():
            number = body.build.reshaped(number, (1,))
        going = state.condition or body.build.constant(np.ones((), np.bool_))
        condition, *results = body.nodes(graph, [number, going, *state.carried])
        carried, rows = results[: len(initial)], results[len(initial) :]
        return _Step(condition=body.build.scalar(condition), carried=carried, rows=rows)

    carried, rows = _while(node, build, _Plan(initial=initial, fixed=[], limit=limit, condition=condition, step=step))
    return [*carried, *rows]


def _stays_true(graph: ir.Graph) -> bool:
    """True when the body hands on the condition that it got, or a constant one."""
    value: ir.Value | None = graph.outputs[0]
    while value is not None and (producer := value.producer()) is not None and producer.op_type == "Identity":
        value = producer.inputs[0]
    if value is graph.inputs[1]:
        return True
    return value is not None and value.const_value is not None and bool(value.const_value.numpy().all())


def _limit(build: Builder, trips: Tensor | None) -> int | Tensor | None:
    if trips is None:
        return None
    if trips.constant is not None:
        number = int(trips.constant.array().reshape(()))
        return None if number > _INT32_MAX else number
    capped = build.op("MINIMUM", [build.scalar(trips), build.constant(np.array(_INT32_MAX, np.int64))])
    return build.cast(capped, "INT32")


@TFLITE.register("Scan")
def scan(node: NodeView, build: Builder) -> Sequence[Tensor]:
    """WHILE over the scanned axis, with a GATHER of each step's inputs."""
    graph, count = node.body("body"), node.integer("num_scan_inputs")
    states = len(node.inputs) - count
    initial = [node.input(position) for position in range(states)]
    scanned = [node.input(states + position) for position in range(count)]
    rows_made = node.num_outputs - states
    axes = [axis % tensor.rank for axis, tensor in zip(node.ints("scan_input_axes", [0] * count), scanned, strict=True)]
    backwards = node.ints("scan_input_directions", [0] * count)
    lengths = [tensor.shape[axis] for tensor, axis in zip(scanned, axes, strict=True)]
    limit: int | Tensor = max(lengths)
    if limit == -1:
        limit = build.scalar(build.vector([build.length(scanned[0], axes[0])]))

    def step(body: Body, state: _State) -> _Step:
        picked: list[Tensor] = []
        for tensor, axis, is_backwards in zip(state.fixed, axes, backwards, strict=True):
            index = state.index
            if is_backwards:
                end = body.build.length(tensor, axis)
                last = body.build.constant(np.array(end, np.int32)) if isinstance(end, int) else body.build.scalar(end)
                one_more = body.build.op("ADD", [index, body.build.constant(np.array(1, np.int32))])
                index = body.build.op("SUB", [last, one_more])
            picked.append(gathered(body.build, tensor, index, axis=axis))
        results = body.nodes(graph, [*state.carried, *picked])
        return _Step(condition=None, carried=results[:states], rows=results[states:])

    carried, rows = _while(node, build, _Plan(initial=initial, fixed=scanned, limit=limit, condition=None, step=step))
    output_axes = node.ints("scan_output_axes", [0] * rows_made)
    directions = node.ints("scan_output_directions", [0] * rows_made)
    done = [
        _laid_out(build, row, axis % row.rank, is_backwards=bool(direction))
        for row, axis, direction in zip(rows, output_axes, directions, strict=True)
    ]
    return [*carried, *done]


def _laid_out(build: Builder, rows: Tensor, axis: int, *, is_backwards: bool) -> Tensor:
    """Rows along another axis, or the last one first."""
    if is_backwards:
        rows = sliced(build, rows, {0: (_INT32_MAX, -_INT32_MAX, -1)})
    order = list(range(1, rows.rank))
    order.insert(axis, 0)
    return build.transposed(rows, order)


@dataclass(frozen=True, slots=True)
class _State:
    """What a body gets."""

    index: Tensor
    condition: Tensor | None
    carried: Sequence[Tensor]
    fixed: Sequence[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What a body gives: whether to go on, the carried values, and a row of each scan output."""

    condition: Tensor | None
    carried: Sequence[Tensor]
    rows: Sequence[Tensor]


_StepMaker: TypeAlias = Callable[[Body, _State], _Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """A WHILE to be made. `fixed` are read by every step; `limit` None: as often as `condition` says."""

    initial: Sequence[Tensor]
    fixed: Sequence[Tensor]
    limit: int | Tensor | None
    condition: Tensor | None
    step: _StepMaker

    @property
    def trips(self) -> int | None:
        """How often it runs, where that is known."""
        return self.limit if isinstance(self.limit, int) and self.condition is None else None


@dataclass(frozen=True, slots=True)
class _Made:
    """The body, its state at the start, and the shapes of its state."""

    graph: int
    start: list[Tensor]
    shapes: list[Shape]
    row_shapes: list[Shape]


def _while(node: NodeView, build: Builder, plan: _Plan) -> tuple[list[Tensor], list[Tensor]]:
    """The carried values at the end, and the rows of each scan output."""
    shapes = [tensor.shape for tensor in plan.initial]
    made = _body(node, build, plan, shapes)
    while isinstance(made, list):
        # A carried value changed its length: the body is made again with that axis open.
        made = _body(node, build, plan, made)
    condition = _condition(node, plan, made)
    outputs = build.ops(
        "WHILE",
        made.start,
        outputs=[(shape, tensor.type) for shape, tensor in zip(made.shapes, made.start, strict=True)],
        condSubgraphIndex=condition,
        bodySubgraphIndex=made.graph,
    )
    ahead = _ahead(plan)
    carried = list(outputs[ahead : ahead + len(plan.initial)])
    rows = list(outputs[len(outputs) - len(made.row_shapes) :])
    if plan.trips is None:
        rows = [sliced(build, row, {0: (1, _INT32_MAX, 1)}) for row in rows]
    return carried, rows


def _ahead(plan: _Plan) -> int:
    """How many of the state come before the carried values."""
    return 1 + isinstance(plan.limit, Tensor) + (plan.condition is not None)


def _body(node: NodeView, build: Builder, plan: _Plan, shapes: list[Shape]) -> _Made | list[Shape]:
    """The body for carried values of these shapes; or more open shapes, where it gives others than it gets."""
    captured = node.scope.captured(node.node)
    start = [build.constant(np.array(0, np.int32))]
    body = node.scope.body(f"{node.node.name}/body")
    inner = body.build
    index = body.input(start[0], ())
    unchanged: list[Tensor] = []
    if isinstance(plan.limit, Tensor):
        start.append(plan.limit)
        unchanged.append(body.input(plan.limit, ()))
    going = None
    if plan.condition is not None:
        start.append(plan.condition)
        going = body.input(plan.condition, ())
    carried = [body.input(tensor, shape) for tensor, shape in zip(plan.initial, shapes, strict=True)]
    fixed = [body.input(tensor, tensor.shape) for tensor in plan.fixed]
    fixed += body.capture(captured)
    step = plan.step(body, _State(index, going, carried, fixed[: len(plan.fixed)]))
    given = [_either(tensor.shape, shape) for tensor, shape in zip(step.carried, shapes, strict=True)]
    if given != shapes:
        body.discard()
        return given
    start += [*(_with_elements(tensor) for tensor in plan.initial), *plan.fixed, *captured.values()]
    outputs = [inner.op("ADD", [index, inner.constant(np.array(1, np.int32))]), *unchanged]
    if plan.condition is not None:
        outputs.append(step.condition or inner.constant(np.ones((), np.bool_)))
    outputs += [*step.carried, *fixed]
    all_shapes = [*((),) * _ahead(plan), *shapes, *(tensor.shape for tensor in fixed)]
    row_shapes: list[Shape] = []
    for row in step.rows:
        first, grown, shape = _appended(build, body, plan, index, row)
        start.append(first)
        outputs.append(grown)
        row_shapes.append(shape)
    kept = {tensor.name for tensor in (*unchanged, *fixed)}
    changing = _outputs(body, [tensor for tensor in outputs if tensor.name not in kept])
    fresh = iter(changing)
    ordered = [tensor if tensor.name in kept else next(fresh) for tensor in outputs]
    return _Made(body.finish(ordered), start, [*all_shapes, *row_shapes], row_shapes)


def _with_elements(tensor: Tensor) -> Tensor:
    if 0 in tensor.shape:
        raise UnsupportedError("LiteRT can't pass a tensor without elements to WHILE, as one of its first values is")
    return tensor


def _appended(build: Builder, body: Body, plan: _Plan, index: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Shape]:
    """The rows at the start, the rows with one more, and their shape."""
    if not row.is_static:
        raise UnsupportedError("a row of its results has a shape that only the run knows")
    inner, zero = body.build, np.zeros((), NUMPY_TYPES[row.type])
    one_row = inner.reshaped(row, (1, *row.shape))
    if plan.trips is not None:
        shape = (plan.trips, *row.shape)
        start = build.filled(shape, zero)
        rows = body.input(start, shape)
        place = inner.vector([index, *(0,) * row.rank])
        return start, inner.op("DYNAMIC_UPDATE_SLICE", [rows, one_row, place], shape=shape, type_=row.type), shape
    start = build.filled((1, *row.shape), zero)
    rows = body.input(start, (-1, *row.shape))
    return start, concatenated(inner, [rows, one_row], 0), (-1, *row.shape)


def _condition(node: NodeView, plan: _Plan, made: _Made) -> int:
    body = node.scope.body(f"{node.node.name}/condition")
    inputs = [body.input(tensor, shape) for tensor, shape in zip(made.start, made.shapes, strict=True)]
    index, *behind = inputs
    checks: list[Tensor] = []
    if plan.limit is not None:
        limit = behind.pop(0) if isinstance(plan.limit, Tensor) else body.build.constant(np.array(plan.limit, np.int32))
        checks.append(body.build.op("LESS", [index, limit], shape=(), type_="BOOL"))
    if plan.condition is not None:
        checks.append(behind.pop(0))
    result = checks[0] if len(checks) == 1 else body.build.op("LOGICAL_AND", checks)
    return body.finish(_outputs(body, [result]))
