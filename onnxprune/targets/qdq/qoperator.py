r"""The QOperator form of a QDQ graph: what stands between DequantizeLinear and QuantizeLinear, as integer operators.

    DequantizeLinear(x) --\
    DequantizeLinear(w) ---> Conv -> QuantizeLinear        becomes        QLinearConv(x, w, bias, scales, zero points)
    DequantizeLinear(b) --/

and an operator that only moves numbers, between two equal scales, works on the integers itself. It is what ONNX
Runtime's optimizer makes of a QDQ graph when it loads it; written down, it is for runtimes, and settings of ONNX
Runtime, that don't optimize. The integers are the same. An operator without such a form keeps its DequantizeLinear
and QuantizeLinear.

Operators of ONNX: QLinearConv, QLinearMatMul. Of ONNX Runtime (com.microsoft): QGemm, QLinearAdd, QLinearMul,
QLinearConcat, QLinearSigmoid, QLinearLeakyRelu, QLinearSoftmax, QLinearGlobalAveragePool, QLinearAveragePool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxprune.contracts import Finding
from onnxprune.errors import TargetError
from onnxprune.graph.weights import constant_array
from onnxprune.targets.qdq.unread import drop_unread_conversions, drop_unread_initializers

__all__ = ["MOVING_OPERATORS", "SIGNED_QOPERATORS", "as_qoperators", "is_dilated_pool", "require_quantized"]

MICROSOFT = "com.microsoft"

MOVING_OPERATORS = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "MaxPool",
        "ReduceMax",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that copy or select what stands at input 0, and that ONNX Runtime computes on int8 and uint8 as well."""

SIGNED_QOPERATORS = Finding(
    topic="int8",
    text="Integer operators on int8 activations are for ARM: on x86 ONNX Runtime computes them one number at a time, "
    "in about four times the time of float. A QDQ file of the same spelling takes no longer than float there.",
    severity="warning",
)
"""What `int8_format = "qoperator"` with the spelling for ARM means elsewhere."""

_WEIGHTS_BESIDE = {
    ir.DataType.UINT8: frozenset({ir.DataType.UINT8, ir.DataType.INT8}),
    ir.DataType.INT8: frozenset({ir.DataType.INT8}),
}

# A bias has the scale of input times weight, computed in float32 by one tool and in float64 by another.
_BIAS_SCALE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantized:
    """A real tensor as integers. `axis` is that of the scales; None: there is one scale."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value
    axis: int | None

    @property
    def triple(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        return self.integers, self.scale, self.zero_point

    @property
    def parameters(self) -> tuple[ir.Value, ir.Value]:
        return self.scale, self.zero_point

    @property
    def dtype(self) -> ir.DataType | None:
        """Element type of the integers; the zero point always says it."""
        return self.zero_point.dtype

    def has_parameters_of(self, other: _Quantized) -> bool:
        """True where integers of the one can be taken for integers of the other."""
        return all(
            mine is theirs or _equal_constants(mine, theirs)
            for mine, theirs in zip(self.parameters, other.parameters, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """The integer operator that takes a node's place; its outputs are the integers of the node's outputs, in order."""

    op_type: str
    inputs: Sequence[ir.Value | None]
    domain: str = ""
    attributes: Sequence[ir.Attr] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """A node, what its inputs are behind DequantizeLinear (None: nothing), and its outputs' QuantizeLinear nodes."""

    node: ir.Node
    operands: tuple[_Quantized | None, ...]
    results: tuple[_Quantized, ...]

    def one_scale(self, position: int) -> _Quantized | None:
        """The operand at `position`, where it has one scale."""
        operand = self.operands[position] if position < len(self.operands) else None
        return operand if operand is not None and operand.axis is None else None

    def computes_in_8_bits(self, *data: _Quantized, weight: _Quantized | None = None) -> bool:
        """True where ONNX Runtime has an integer operator for these element types.

        Inputs and results are all uint8 or all int8; the weight is int8, or uint8 as well beside uint8.
        """
        dtypes = {found.dtype for found in (*data, *self.results)}
        if len(dtypes) != 1:
            return False
        (dtype,) = dtypes
        return dtype in _WEIGHTS_BESIDE and (weight is None or weight.dtype in _WEIGHTS_BESIDE[dtype])

    def has_input(self, position: int) -> bool:
        """True where the node has an input there."""
        return position < len(self.node.inputs) and self.node.inputs[position] is not None


_Form: TypeAlias = Callable[[_Surroundings], _Written | None]


def as_qoperators(model: ir.Model) -> ir.Model:
    """A copy of a QDQ graph with integer operators; tensors of integers, inputs, outputs and nodes keep their names.

    Args:
        model: From `spell`, or any QDQ graph. Weights are shared with the copy, the graph is not changed.
    """
    copy = model.clone()
    copy.opset_imports.setdefault(MICROSOFT, 1)
    for node in list(copy.graph):
        around = _surroundings(node)
        if around is None:
            continue
        written = _FORMS.get(node.op_type, _moved)(around)
        if written is not None:
            _replace(copy.graph, around, written)
    drop_unread_conversions(copy.graph)
    drop_unread_initializers(copy.graph)
    return copy


def is_dilated_pool(node: ir.Node) -> bool:
    """True for an AveragePool with dilations, which QLinearAveragePool does not have.

    ONNX Runtime (1.31) makes one of it all the same where it stands between DequantizeLinear and QuantizeLinear, and
    then refuses its own model.
    """
    return node.op_type == "AveragePool" and any(step != 1 for step in node.attributes.get_ints("dilations", ()))


def require_quantized(model: ir.Model) -> None:
    """Refuse a model in which nothing can become an integer operator.

    Raises:
        TargetError: It has no QuantizeLinear.
    """
    if not any(node.op_type == "QuantizeLinear" for node in model.graph):
        raise TargetError(
            "int8_format 'qoperator' asks for integer operators, and nothing in the model is quantized.",
            "Add pass 'quant', or leave int8_format out of the configuration of target 'onnx'.",
        )


# --- forms: one function for each kind of operator ------------------------------------------------------------------


def _conv(around: _Surroundings) -> _Written | None:
    data, weight, result = around.one_scale(0), _operand(around, 1), around.results[0]
    if data is None or weight is None or weight.axis not in (None, 0):
        return None
    if not around.computes_in_8_bits(data, weight=weight):
        return None
    inputs = [*data.triple, *weight.triple, *result.parameters]
    if around.has_input(2):
        bias = _operand(around, 2)
        if bias is None or not _has_bias_scale(bias, data, weight):
            return None
        inputs.append(bias.integers)
    return _Written(op_type="QLinearConv", inputs=inputs, attributes=_attributes(around.node))


def _gemm(around: _Surroundings) -> _Written | None:
    node = around.node
    data, weight, result = around.one_scale(0), _operand(around, 1), around.results[0]
    column_axis = 0 if node.attributes.get_int("transB", 0) else 1
    is_scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    if data is None or weight is None or weight.axis not in (None, column_axis) or is_scaled:
        return None
    if not around.computes_in_8_bits(data, weight=weight):
        return None
    inputs: list[ir.Value | None] = [*data.triple, *weight.triple, None, *result.parameters]
    if around.has_input(2):
        bias = _operand(around, 2)
        if bias is None or not _has_bias_scale(bias, data, weight):
            return None
        inputs[6] = bias.integers
    return _Written(
        op_type="QGemm", domain=MICROSOFT, inputs=inputs, attributes=_attributes(node, without=("beta", "broadcast"))
    )


def _matmul(around: _Surroundings) -> _Written | None:
    data, weight, result = around.one_scale(0), _operand(around, 1), around.results[0]
    if data is None or weight is None or not around.computes_in_8_bits(data, weight=weight):
        return None
    rank = None if weight.integers.shape is None else len(weight.integers.shape)
    if weight.axis is not None and (rank != 2 or weight.axis != 1):
        return None
    return _Written(op_type="QLinearMatMul", inputs=[*data.triple, *weight.triple, *result.parameters])


def _binary(op_type: str) -> _Form:
    def write(around: _Surroundings) -> _Written | None:
        first, second = around.one_scale(0), around.one_scale(1)
        if first is None or second is None or len(around.node.inputs) != 2:
            return None
        if not around.computes_in_8_bits(first, second):
            return None
        inputs = [*first.triple, *second.triple, *around.results[0].parameters]
        return _Written(op_type=op_type, domain=MICROSOFT, inputs=inputs)

    return write


def _unary(op_type: str, *, without: Sequence[str] = (), **added: int) -> _Form:
    def write(around: _Surroundings) -> _Written | None:
        data = around.one_scale(0)
        if data is None or not around.computes_in_8_bits(data):
            return None
        extra = [ir.AttrInt64(name, number) for name, number in added.items()]
        return _Written(
            op_type=op_type,
            domain=MICROSOFT,
            inputs=[*data.triple, *around.results[0].parameters],
            attributes=[*_attributes(around.node, without=without), *extra],
        )

    return write


def _average_pool(around: _Surroundings) -> _Written | None:
    if is_dilated_pool(around.node):
        return None
    return _unary("QLinearAveragePool", without=("dilations",), channels_last=0)(around)


def _concat(around: _Surroundings) -> _Written | None:
    operands = [around.one_scale(position) for position in range(len(around.node.inputs))]
    known = [operand for operand in operands if operand is not None]
    result = around.results[0]
    if len(known) != len(operands) or not around.computes_in_8_bits(*known):
        return None
    if all(operand.has_parameters_of(result) for operand in known):
        inputs = [operand.integers for operand in known]
        return _Written(op_type="Concat", inputs=inputs, attributes=_attributes(around.node))
    inputs = [*result.parameters, *(value for operand in known for value in operand.triple)]
    return _Written(op_type="QLinearConcat", domain=MICROSOFT, inputs=inputs, attributes=_attributes(around.node))


def _moved(around: _Surroundings) -> _Written | None:
    data = around.one_scale(0)
    if around.node.op_type not in MOVING_OPERATORS or data is None:
        return None
    if not around.computes_in_8_bits(data) or not all(data.has_parameters_of(result) for result in around.results):
        return None
    return _Written(
        op_type=around.node.op_type,
        inputs=[data.integers, *around.node.inputs[1:]],
        attributes=_attributes(around.node),
    )


_FORMS: dict[str, _Form] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _binary("QLinearAdd"),
    "Mul": _binary("QLinearMul"),
    "Concat": _concat,
    "Sigmoid": _unary("QLinearSigmoid"),
    "LeakyRelu": _unary("QLinearLeakyRelu"),
    # `opset` tells it to normalize along one axis, as ONNX does since 13.
    "Softmax": _unary("QLinearSoftmax", opset=13),
    "GlobalAveragePool": _unary("QLinearGlobalAveragePool", channels_last=0),
    "AveragePool": _average_pool,
}


# --- reading the graph ----------------------------------------------------------------------------------------------


def _surroundings(node: ir.Node) -> _Surroundings | None:
    """What stands around a float operator; None where not all that it makes is quantized, and by nothing else read."""
    if node.domain not in ("", "ai.onnx") or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return None
    quantizers = [_only_quantizer(value) for value in node.outputs if value.uses() or value.is_graph_output()]
    results = [None if quantizer is None else _result_of(quantizer) for quantizer in quantizers]
    known = tuple(result for result in results if result is not None)
    if not known or len(known) != len(results):
        return None
    return _Surroundings(node=node, operands=tuple(_behind_dequantizer(value) for value in node.inputs), results=known)


def _operand(around: _Surroundings, position: int) -> _Quantized | None:
    return around.operands[position] if position < len(around.operands) else None


def _behind_dequantizer(value: ir.Value | None) -> _Quantized | None:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or len(producer.inputs) != 3:
        return None
    if producer.attributes.get_int("block_size", 0):
        return None
    return _quantized(producer.inputs[0], producer)


def _only_quantizer(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    reader, position = next(iter(uses))
    return reader if reader.op_type == "QuantizeLinear" and position == 0 and len(reader.inputs) == 3 else None


def _result_of(quantizer: ir.Node) -> _Quantized | None:
    found = _quantized(quantizer.outputs[0], quantizer)
    return found if found is not None and found.axis is None else None


def _quantized(integers: ir.Value | None, conversion: ir.Node) -> _Quantized | None:
    scale, zero_point = conversion.inputs[1], conversion.inputs[2]
    scales = constant_array(scale)
    if integers is None or scale is None or zero_point is None or scales is None or zero_point.const_value is None:
        return None
    if scale.dtype != ir.DataType.FLOAT:
        return None
    axis = None if scales.ndim == 0 else conversion.attributes.get_int("axis", 1)
    return _Quantized(integers=integers, scale=scale, zero_point=zero_point, axis=axis)


def _has_bias_scale(bias: _Quantized, data: _Quantized, weight: _Quantized) -> bool:
    """True where the bias can be added to the products as it is: int32 in the scale input * weight."""
    zero_point, stored = constant_array(bias.zero_point), constant_array(bias.scale)
    scales = [constant_array(operand.scale) for operand in (data, weight)]
    if zero_point is None or stored is None or scales[0] is None or scales[1] is None:
        return False
    if bias.integers.dtype != ir.DataType.INT32 or np.any(zero_point):
        return False
    wanted = scales[0].astype(np.float64) * scales[1]
    is_close: bool = np.allclose(stored, wanted, rtol=_BIAS_SCALE_TOLERANCE, atol=0.0)
    return is_close


def _equal_constants(one: ir.Value, other: ir.Value) -> bool:
    first, second = constant_array(one), constant_array(other)
    return first is not None and second is not None and first.dtype == second.dtype and np.array_equal(first, second)


def _attributes(node: ir.Node, *, without: Sequence[str] = ()) -> list[ir.Attr]:
    return [attribute for name, attribute in node.attributes.items() if name not in without]


# --- writing --------------------------------------------------------------------------------------------------------


def _replace(graph: ir.Graph, around: _Surroundings, written: _Written) -> None:
    node = around.node
    name = node.name
    integer = ir.Node(
        written.domain,
        written.op_type,
        written.inputs,
        written.attributes,
        num_outputs=len(node.outputs),
        name=name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, integer)
    results = iter(around.results)
    quantizers = []
    for old, new in zip(node.outputs, integer.outputs, strict=True):
        if not old.uses():
            new.name = old.name
            continue
        (quantizer,) = old.consumers()
        integers = next(results).integers
        new.type, new.shape = integers.type, integers.shape or old.shape
        new.metadata_props.update(integers.metadata_props)
        integers.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, integers.name = integers.name, None
        quantizers.append(quantizer)
    graph.remove([*quantizers, node], safe=True)
