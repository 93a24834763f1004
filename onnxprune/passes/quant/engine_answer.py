"""Reading scales out of a QDQ model that a foreign engine made of a copy with plain names (`engine_copy.py`).

Nothing is read by the names that engines invent. The float graph and the engine's are walked side by side: behind its
QuantizeLinear and DequantizeLinear nodes the engine's graph must be the float graph, except that a Relu or Clip may be
gone (the saturation of integers does its work). Anything else that an engine does to a graph (the Mul nodes of
SmoothQuant, folded weights) would make its scales those of another model, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.errors import PassError
from onnxprune.graph.weights import constant_array
from onnxprune.ops.quant import QUANT, activation_inputs, activation_outputs, weight_input
from onnxprune.passes.quant.engine_copy import node_alias

__all__ = ["EngineNumbers", "TensorNumbers", "WeightNumbers", "read_answer"]

QUANTIZED_SUFFIX = "_quant"
REMOVABLE = ("Relu", "Clip")

MAX_ROUNDING_STEPS = 0.51
"""How far a constant's integers may be from it: half a step, and what float32 adds."""
FLOAT32_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNumbers:
    """How the engine quantizes one activation; `zero_point` is for signed 8-bit integers."""

    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNumbers:
    """How the engine quantizes one weight: one scale, or one for each index of `axis`."""

    scales: npt.NDArray[np.float32]
    axis: int | None
    is_symmetric_int8: bool


@dataclass(slots=True, kw_only=True)
class EngineNumbers:
    """What the engine's model says. Keys are the float model's own names of tensors, weights and nodes."""

    activations: dict[str, TensorNumbers] = field(default_factory=dict)
    weights: dict[str, WeightNumbers] = field(default_factory=dict)
    float_nodes: dict[str, str] = field(default_factory=dict)
    """Nodes with a row in the operator table that the engine left in float, with what is not integer about them."""


def read_answer(model: ir.Model, answer: ir.Model, *, engine: str) -> EngineNumbers:
    """The numbers of `answer`, an engine's QDQ form of the copy of `model` that `write_copy` wrote.

    Raises:
        PassError: `answer` is not `model` behind its QuantizeLinear and DequantizeLinear nodes.
    """
    return _Reader(model, answer, engine).read()


class _Reader:
    def __init__(self, model: ir.Model, answer: ir.Model, engine: str) -> None:
        self._model = model
        self._engine = engine
        self._answer_nodes = {node.name: node for node in answer.graph}
        self._counterparts: dict[ir.Value, ir.Value] = {}
        self._numbers = EngineNumbers()
        if len(model.graph.inputs) != len(answer.graph.inputs):
            raise self._refusal(f"it has {len(answer.graph.inputs)} inputs instead of {len(model.graph.inputs)}")
        for mine, theirs in zip(model.graph.inputs, answer.graph.inputs, strict=True):
            self._counterparts[mine] = theirs

    def read(self) -> EngineNumbers:
        for position, node in enumerate(self._model.graph):
            found = self._find(node, position)
            if found is not None:
                self._read_node(node, found)
            elif node.op_type in REMOVABLE and node.inputs[0] in self._counterparts:
                self._pass_on(node)
            else:
                raise self._refusal(f"'{node.name}' ({node.op_type}) is gone")
        return self._numbers

    def _find(self, node: ir.Node, position: int) -> ir.Node | None:
        alias = node_alias(position)
        found = self._answer_nodes.get(alias) or self._answer_nodes.get(f"{alias}{QUANTIZED_SUFFIX}")
        if found is not None and (found.op_type != node.op_type or len(found.outputs) != len(node.outputs)):
            raise self._refusal(f"'{node.name}' ({node.op_type}) became a {found.op_type}")
        return found

    def _pass_on(self, node: ir.Node) -> None:
        """Let the output of a Relu or Clip that is gone be what its input is now."""
        given, made = node.inputs[0], node.outputs[0]
        if given is None:
            raise self._refusal(f"'{node.name}' has no input")
        self._counterparts[made] = self._counterparts[given]
        numbers = self._numbers.activations.get(given.name or "")
        if numbers is not None:
            self._numbers.activations[made.name or ""] = numbers
        else:
            self._numbers.float_nodes[node.name or ""] = f"'{given.name}' has no scale"

    def _read_node(self, node: ir.Node, found: ir.Node) -> None:
        if len(found.inputs) != len(node.inputs):
            raise self._refusal(f"'{node.name}' ({node.op_type}) has {len(found.inputs)} inputs now")
        row = QUANT.get(node)
        weight = weight_input(node, row) if row is not None else None
        integers: set[ir.Value] = set()
        for mine, theirs in zip(node.inputs, found.inputs, strict=True):
            if mine is None or theirs is None:
                if mine is not theirs:
                    raise self._refusal(f"'{node.name}' ({node.op_type}) has other inputs")
                continue
            if self._read_input(node, mine, theirs, is_weight=mine is weight and mine.const_value is not None):
                integers.add(mine)
        for mine, theirs in zip(node.outputs, found.outputs, strict=True):
            self._counterparts[mine] = theirs
            numbers = next(
                (_tensor_numbers(use) for use in theirs.consumers() if use.op_type == "QuantizeLinear"), None
            )
            if numbers is not None:
                self._numbers.activations[mine.name or ""] = numbers
                integers.add(mine)
        if row is None:
            return
        wanted = (*activation_inputs(node, row), *activation_outputs(node, row), *(() if weight is None else (weight,)))
        missing = [value.name for value in wanted if value not in integers]
        if missing:
            self._numbers.float_nodes[node.name or ""] = f"'{missing[0]}' has no scale"

    def _read_input(self, node: ir.Node, mine: ir.Value, theirs: ir.Value, *, is_weight: bool) -> bool:
        """Note the numbers of one input; True where it arrives as integers."""
        dequantize = theirs.producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            self._require_same(node, mine, theirs)
            return False
        stored = _input(dequantize, 0)
        quantize = stored.producer() if stored is not None else None
        if quantize is None:
            return self._read_constant(node, mine, dequantize, is_weight=is_weight)
        origin = _input(quantize, 0)
        if quantize.op_type != "QuantizeLinear" or origin is None:
            raise self._refusal(f"'{node.name}' ({node.op_type}) reads the output of a {quantize.op_type}")
        self._require_same(node, mine, origin)
        numbers = _tensor_numbers(dequantize)
        if numbers is None or mine.const_value is not None:
            return False
        self._numbers.activations.setdefault(mine.name or "", numbers)
        return True

    def _require_same(self, node: ir.Node, mine: ir.Value, theirs: ir.Value) -> None:
        """Refuse an input that is not computed from what it was computed from, or a constant that changed."""
        if mine.const_value is None:
            if self._counterparts.get(mine) is not theirs:
                raise self._refusal(f"'{node.name}' ({node.op_type}) no longer reads '{mine.name}'")
            return
        array, other = constant_array(mine), constant_array(theirs)
        if array is None or other is None or not np.array_equal(array, other, equal_nan=array.dtype.kind == "f"):
            raise self._refusal(f"the constant '{mine.name}' of '{node.name}' ({node.op_type}) is another one")

    def _read_constant(self, node: ir.Node, mine: ir.Value, dequantize: ir.Node, *, is_weight: bool) -> bool:
        own = constant_array(mine)
        stored = _constant_input(dequantize, 0)
        scales = _constant_input(dequantize, 1)
        if own is None or stored is None or scales is None or own.shape != stored.shape:
            raise self._refusal(f"the constant '{mine.name}' of '{node.name}' ({node.op_type}) is another one")
        zero_points = _constant_input(dequantize, 2)
        points = np.zeros_like(scales) if zero_points is None else zero_points.astype(np.float32)
        axis = dequantize.attributes.get_int("axis", 1) % max(own.ndim, 1) if scales.size > 1 else None
        if scales.size not in (1, own.shape[axis] if axis is not None else 1):
            raise self._refusal(f"'{mine.name}' of '{node.name}' ({node.op_type}) has scales in blocks")
        if is_weight or stored.dtype == np.int32:
            self._require_rounded(
                node, mine, own, stored, _spread(scales, axis, own.ndim), _spread(points, axis, own.ndim)
            )
        # Operands of Add and Mul get scales from their own numbers in `scales.py`. The engine's (1.0) leave zero out of
        # their range: the constant 0.5 becomes the integer 0.
        if is_weight:
            self._numbers.weights[mine.name or ""] = WeightNumbers(
                scales=np.atleast_1d(scales).reshape(-1).astype(np.float32),
                axis=axis,
                is_symmetric_int8=stored.dtype == np.int8 and not points.any(),
            )
        return True

    def _require_rounded(
        self,
        node: ir.Node,
        mine: ir.Value,
        own: npt.NDArray[np.generic],
        stored: npt.NDArray[np.generic],
        scales: npt.NDArray[np.generic],
        points: npt.NDArray[np.generic],
    ) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = own.astype(np.float64) / scales.astype(np.float64) + points.astype(np.float64)
            steps = np.abs(wanted - stored.astype(np.float64))
        # The engine computes in float32, which counts where a bias has large integers. A bias beyond int32 comes back
        # wrapped around; ours is made from the float one.
        allowed = MAX_ROUNDING_STEPS + FLOAT32_ROUNDING * np.abs(wanted)
        # Not `any above`: a scale of zero makes NaN, which is no match either.
        if not ((steps <= allowed) | (np.abs(wanted) >= 2**31)).all():
            raise self._refusal(f"'{mine.name}' of '{node.name}' ({node.op_type}) is not the model's weight, rounded")

    def _refusal(self, what: str) -> PassError:
        return PassError(
            f"{self._engine} gave back another graph than it was given: {what}.",
            "Its scales would not fit this model. Use `quant.engine = 'onnxprune'`.",
        )


def _tensor_numbers(node: ir.Node) -> TensorNumbers | None:
    """Scale and signed zero point of a QuantizeLinear or DequantizeLinear of 8 bits; None for other ones."""
    scale, zero_point = _constant_input(node, 1), _constant_input(node, 2)
    if scale is None or scale.size != 1:
        return None
    if zero_point is None:
        point, shift = 0, 128
    elif zero_point.dtype in (np.uint8, np.int8) and zero_point.size == 1:
        point, shift = int(zero_point.reshape(-1)[0]), 128 if zero_point.dtype == np.uint8 else 0
    else:
        return None
    return TensorNumbers(scale=float(np.float32(scale.reshape(-1)[0])), zero_point=point - shift)


def _spread(numbers: npt.NDArray[np.generic], axis: int | None, ndim: int) -> npt.NDArray[np.generic]:
    """Scales -> shape [1, ..., n, ..., 1] with n at `axis`."""
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = -1
    return numbers.reshape(shape)


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _constant_input(node: ir.Node, position: int) -> npt.NDArray[np.generic] | None:
    value = _input(node, position)
    return None if value is None else constant_array(value)
