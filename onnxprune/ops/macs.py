"""Multiply-accumulates of a model, counted from static shapes.

Definition. One MAC is one multiplication whose product is added to a running sum: a dot product of length K is K MACs.
    Conv            N * M * spatial_out * (C / group) * kernel          M output channels, C input channels
    ConvTranspose   N * C * spatial_in * (M / group) * kernel
    Gemm, MatMul    batch * M * N * K
    Einsum          the product of the sizes of all letters (a contraction done in one step)
    LSTM, GRU, RNN  steps * batch * directions * gates * hidden * (input + hidden)
Not counted, because nothing is summed up by multiplication: bias, activations, normalization, element-wise operators,
pooling, reductions, resizing, data movement, (de)quantization. These are listed in the table with zero MACs, so that
"zero" is a statement and not an absence. Literature that says "GFLOPs" mostly means this figure (ResNet-50: 4.09), or
twice this figure. Zeros in weights are counted: a MAC with a zero takes as long.

An If counts its larger branch. Loop, Scan and SequenceMap are listed as not counted: how often a body runs is not
known before it runs. An operator without a row is listed as not counted, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from onnxprune.errors import OnnxPruneError
from onnxprune.graph.shapes import fix_input_shapes
from onnxprune.ops.layout import LAYOUT
from onnxprune.ops.shapes import SHAPES
from onnxprune.ops.table import OpTable

__all__ = ["MACS", "MacsCount", "MacsRule", "count_macs", "count_macs_per_sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MacsCount:
    """MACs of one model.

    Attributes:
        total: Sum over all nodes, or None when a node with MACs has a dimension that is not static.
        per_node: MACs by node name, for nodes whose count is known and not zero.
        dynamic: Names of nodes whose count needs a dimension that is not static.
        uncounted: "name (operator)" of nodes without a row in the table, and of loops.
    """

    total: int | None
    per_node: Mapping[str, int]
    dynamic: tuple[str, ...]
    uncounted: tuple[str, ...]


class DimensionReader:
    """Reads static shapes, with numbers for some symbolic dimensions."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        self._dims = dims

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """All dimensions as numbers, or None where the rank or one of them is unknown."""
        if value is None or value.shape is None:
            return None
        sizes = [self._size(dim) for dim in value.shape]
        return tuple(size for size in sizes if size is not None) if None not in sizes else None

    def _size(self, dim: int | ir.SymbolicDim) -> int | None:
        if isinstance(dim, int):
            return dim
        return self._dims.get(dim.value) if dim.value is not None else None


MacsRule: TypeAlias = Callable[[ir.Node, DimensionReader], int | None]
"""MACs of a node, or None where a dimension it needs is not static."""

MACS: OpTable[MacsRule] = OpTable("macs")


def count_macs(model: ir.Model, *, dims: Mapping[str, int] | None = None) -> MacsCount:
    """Count the MACs of one inference.

    Args:
        model: Its shapes must be fresh (`graph.shapes.refresh_shapes`).
        dims: Numbers for symbolic dimensions ({"batch": 1}); others stay unknown.
    """
    return _count(model.graph, DimensionReader(dims or {}))


def count_macs_per_sample(model: ir.Model) -> MacsCount:
    """MACs with a dynamic batch (axis 0 of the inputs) taken as 1; the total is None where more is dynamic."""
    first = [value.shape[0] for value in model.graph.inputs if value.shape is not None and value.shape.rank() > 0]
    batch = {dim.value: 1 for dim in first if isinstance(dim, ir.SymbolicDim) and dim.value is not None}
    counted = count_macs(model, dims=batch)
    shapes = [_with_batch_of_one(value.shape) for value in model.graph.inputs]
    if counted.total is not None or None in shapes:
        return counted
    # A Reshape to -1 loses the name of the batch: infer anew from static inputs.
    static = model.clone()
    names = [value.name or "" for value in static.graph.inputs]
    try:
        fix_input_shapes(static, {n: s for n, s in zip(names, shapes, strict=True) if s is not None}, SHAPES)
    except OnnxPruneError:
        return counted  # the model can't work with a batch of 1
    return count_macs(static)


def _with_batch_of_one(shape: ir.Shape | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = [1 if axis == 0 and not isinstance(dim, int) else dim for axis, dim in enumerate(shape)]
    static = tuple(size for size in sizes if isinstance(size, int))
    return static if len(static) == len(sizes) else None


def _count(nodes: Iterable[ir.Node], reader: DimensionReader) -> MacsCount:
    per_node: dict[str, int] = {}
    dynamic: list[str] = []
    uncounted: list[str] = []
    for node in nodes:
        name = node.name or node.op_type
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            branches = [_count(graph, reader) for graph in _subgraphs(node)]
            for branch in branches:
                uncounted.extend(branch.uncounted)
            if any(branch.total is None for branch in branches):
                dynamic.append(name)
                continue
            count: int | None = max((branch.total or 0 for branch in branches), default=0)
        else:
            rule = MACS.get(node)
            if rule is None:
                uncounted.append(f"{name} ({node.op_type})")
                continue
            count = rule(node, reader)
        if count is None:
            dynamic.append(name)
        elif count:
            per_node[name] = count
    total = None if dynamic else sum(per_node.values())
    return MacsCount(total=total, per_node=per_node, dynamic=tuple(dynamic), uncounted=tuple(uncounted))


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _zero(node: ir.Node, reader: DimensionReader) -> int | None:  # noqa: ARG001 - the rule's signature
    return 0


# --- rows with MACs -------------------------------------------------------------------------------------------


@MACS.register("Conv", "ConvInteger", "QLinearConv", "DeformConv")
@MACS.register("FusedConv", domain="com.microsoft")
def _conv(node: ir.Node, reader: DimensionReader) -> int | None:
    layout = LAYOUT.get(node)
    weight = reader.shape(_input(node, layout.weight_input or 0)) if layout else None
    out = reader.shape(node.outputs[0])
    if weight is None or out is None:
        return None
    # Every output element is a dot product over (C / group) * kernel.
    return math.prod(out) * math.prod(weight[1:])


@MACS.register("NhwcFusedConv", domain="com.microsoft")
def _conv_nhwc(node: ir.Node, reader: DimensionReader) -> int | None:
    weight, out = reader.shape(_input(node, 1)), reader.shape(node.outputs[0])
    return None if weight is None or out is None else math.prod(out) * math.prod(weight[1:])


@MACS.register("ConvTranspose")
def _conv_transpose(node: ir.Node, reader: DimensionReader) -> int | None:
    data, weight = reader.shape(_input(node, 0)), reader.shape(_input(node, 1))
    if data is None or weight is None:
        return None
    # Every input element is scattered into (M / group) * kernel outputs.
    return math.prod(data) * math.prod(weight[1:])


def _matmul_macs(left: tuple[int, ...] | None, out: tuple[int, ...] | None, *, inner: int = -1) -> int | None:
    if left is None or out is None:
        return None
    return math.prod(out) * left[inner]


@MACS.register("MatMul", "MatMulInteger", "QLinearMatMul")
@MACS.register("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", domain="com.microsoft")
def _matmul(node: ir.Node, reader: DimensionReader) -> int | None:
    return _matmul_macs(reader.shape(_input(node, 0)), reader.shape(node.outputs[0]))


@MACS.register("Gemm")
@MACS.register("FusedGemm", "QGemm", "FusedMatMul", domain="com.microsoft")
def _gemm(node: ir.Node, reader: DimensionReader) -> int | None:
    inner = -2 if node.attributes.get_int("transA", 0) else -1
    return _matmul_macs(reader.shape(_input(node, 0)), reader.shape(node.outputs[0]), inner=inner)


@MACS.register("Einsum")
def _einsum(node: ir.Node, reader: DimensionReader) -> int | None:
    terms = node.attributes.get_string("equation", "").replace(" ", "").split("->")[0].split(",")
    shapes = [reader.shape(value) for value in node.inputs]
    if any(shape is None for shape in shapes) or len(terms) != len(shapes):
        return None
    if len(terms) == 1:
        return 0  # a transpose, a trace or a sum: nothing is multiplied
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(_letters(term, len(shape or ())), shape or (), strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    return math.prod(sizes.values())


def _letters(term: str, rank: int) -> list[str]:
    """One letter per axis; an ellipsis becomes numbered letters, counted from its last axis as broadcasting does."""
    head, dots, tail = term.partition("...")
    if not dots:
        return list(head)
    hidden = rank - len(head) - len(tail)
    return [*head, *(f".{hidden - index}" for index in range(hidden)), *tail]


@MACS.register("RNN", "GRU", "LSTM")
def _recurrent(node: ir.Node, reader: DimensionReader) -> int | None:
    data, weight = reader.shape(_input(node, 0)), reader.shape(_input(node, 1))
    recurrence = reader.shape(_input(node, 2))
    if data is None or weight is None or recurrence is None:
        return None
    # W (directions, gates * hidden, input) and R (directions, gates * hidden, hidden) are each used once a step.
    return data[0] * data[1] * (math.prod(weight) + math.prod(recurrence))


@MACS.register("Attention", since_version=23)
def _attention(node: ir.Node, reader: DimensionReader) -> int | None:
    """Q K^T and the weighted sum of V; a (batch, heads, length, width) or (batch, length, heads * width)."""
    query, key, value = (reader.shape(_input(node, position)) for position in range(3))
    if query is None or key is None or value is None:
        return None
    past = reader.shape(_input(node, 4))
    if _input(node, 4) is not None and past is None:
        return None
    length = key[-2] + (past[-2] if past is not None else 0)
    if len(query) == 4:
        heads, key_width, value_width = query[1], query[3], value[3]
    else:
        heads = node.attributes.get_int("q_num_heads", 1)
        key_width = query[-1] // heads
        value_width = value[-1] // node.attributes.get_int("kv_num_heads", heads)
    return query[0] * heads * query[-2] * length * (key_width + value_width)


@MACS.register("MultiHeadAttention", domain="com.microsoft")
def _multi_head_attention(node: ir.Node, reader: DimensionReader) -> int | None:
    """Q K^T and the weighted sum of V of separate (batch, length, hidden) tensors without a cache."""
    query, key, value = (reader.shape(_input(node, position)) for position in range(3))
    if query is None or key is None or value is None or {len(query), len(key), len(value)} != {3}:
        return None
    return query[0] * query[1] * key[1] * (query[2] + value[2])


@MACS.register("GroupQueryAttention", domain="com.microsoft")
def _group_query_attention(node: ir.Node, reader: DimensionReader) -> int | None:
    """Q K^T and the weighted sum of V: query (batch, length, heads * width), alone or with keys and values behind it.

    With a cache (batch, key heads, past length, width), as if it were full.
    """
    query, past = reader.shape(_input(node, 0)), reader.shape(_input(node, 3))
    out = reader.shape(node.outputs[0])
    if query is None or out is None or (past is None and _input(node, 3) is not None):
        return None
    length = query[1] + (past[2] if past is not None else 0)
    return 2 * math.prod(out) * length


@MACS.register("Attention", domain="com.microsoft")
def _fused_attention(node: ir.Node, reader: DimensionReader) -> int | None:
    """The projection to Q, K and V (input, 3 * hidden), then Q K^T and the weighted sum of V."""
    data, weight, out = reader.shape(_input(node, 0)), reader.shape(_input(node, 1)), reader.shape(node.outputs[0])
    if data is None or weight is None or out is None:
        return None
    batch, length = data[0], data[1]
    value_width = out[-1]
    key_width = (weight[1] - value_width) // 2
    return batch * length * math.prod(weight) + batch * length * length * (key_width + value_width)


# --- rows without MACs ----------------------------------------------------------------------------------------

MACS.add(
    _zero,
    # normalization: per-element scale and shift, statistics by addition
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
    *("LpNormalization", "MeanVarianceNormalization", "LRN", "RMSNormalization"),
    # ONNX Runtime has its fused one in ONNX's own domain as well
    "SimplifiedLayerNormalization",
    # activations
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus"),
    *("Softsign", "Softmax", "LogSoftmax", "Hardmax", "ThresholdedRelu", "Gelu", "Mish", "Swish", "Clip", "Shrink"),
    # element-wise
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Mod", "Neg", "Abs", "Sqrt", "Exp", "Log"),
    *("Erf", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh"),
    *("Cosh", "Asinh", "Acosh", "Atanh", "Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
    *("And", "Or", "Xor", "Not", "IsNaN", "IsInf", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"),
    # pooling and reductions
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MaxRoiPool"),
    *("MaxUnpool", "RoiAlign", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1"),
    *("ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin", "CumSum", "CumProd"),
    # movement
    *("Identity", "Cast", "CastLike", "BitCast", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat"),
    *("Split", "Slice", "Gather", "GatherElements", "GatherND", "Scatter", "ScatterElements", "ScatterND"),
    *("TensorScatter", "Pad", "Tile", "Expand", "DepthToSpace", "SpaceToDepth", "Col2Im", "CenterCropPad"),
    *("ReverseSequence", "Trilu", "Compress", "Dropout"),
    # sampling: a handful of additions per element, weights come from positions
    *("Resize", "Upsample", "GridSample", "AffineGrid", "RotaryEmbedding"),
    # shapes, constants, random numbers, selection
    *("Shape", "Size", "Constant", "ConstantOfShape", "Range", "EyeLike", "OneHot", "NonZero", "Unique", "TopK"),
    *("NonMaxSuppression", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"),
    *("Multinomial", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix"),
    # numbers in other spellings
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    # text and pictures
    *("StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder"),
    # sequences and optionals
    *("SequenceConstruct", "SequenceEmpty", "SequenceAt", "SequenceInsert", "SequenceErase", "SequenceLength"),
    *("ConcatFromSequence", "SplitToSequence", "Optional", "OptionalGetElement", "OptionalHasElement"),
)
MACS.add(
    _zero,
    *("QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu"),
    *("QLinearSoftmax", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean"),
    *("QLinearWhere", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd", "BiasSplitGelu", "GroupNorm"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", "NhwcMaxPool"),
    *(
        "SimplifiedLayerNormalization",
        "LayerNormalization",
        "RotaryEmbedding",
        "FusedConcatCast",
        "ReorderInput",
        "ReorderOutput",
        "DynamicTimeWarping",
    ),
    domain="com.microsoft",
)
