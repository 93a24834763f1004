"""Shape rules for operators that ONNX's own inference does not know: ONNX Runtime's contrib operators.

Documented in onnxruntime's docs/ContribOperators.md. Quantized weights, saved by `optimize_model` or by Optimum, and
transformer blocks are full of them. A rule says (None, None) for what it can't tell; it never guesses, and it does no
arithmetic on symbolic dimensions (their names come from the model file, and parsing them as formulas can be made
arbitrarily slow).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from onnxprune.graph.shapes import ShapeRule
from onnxprune.ops.table import OpTable

__all__ = ["SHAPES"]

_MS = "com.microsoft"

SHAPES: OpTable[ShapeRule] = OpTable("shapes")

_Dim = int | ir.SymbolicDim | None
_Output = tuple[ir.DataType | None, ir.Shape | None]


# --- what rules are made of -------------------------------------------------------------------------------------


def _value(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dtype(node: ir.Node, index: int) -> ir.DataType | None:
    value = _value(node, index)
    return None if value is None else value.dtype


def _dims(node: ir.Node, index: int) -> list[_Dim] | None:
    value = _value(node, index)
    return None if value is None or value.shape is None else list(value.shape)


def _shape(dims: Sequence[_Dim] | None) -> ir.Shape | None:
    return None if dims is None else ir.Shape(list(dims))


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else tuple(attribute.as_ints())


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _integer(node: ir.Node, index: int) -> int | None:
    """The number of a constant input."""
    value = _value(node, index)
    stored = None if value is None else value.const_value
    return int(stored.numpy().item()) if stored is not None and stored.size == 1 else None


def _broadcast(one: Sequence[_Dim] | None, other: Sequence[_Dim] | None) -> list[_Dim] | None:
    """NumPy's broadcasting; a dimension that could be either is unknown."""
    if one is None or other is None:
        return None
    rank = max(len(one), len(other))
    left = [1] * (rank - len(one)) + list(one)
    right = [1] * (rank - len(other)) + list(other)
    return [_broadcast_dim(a, b) for a, b in zip(left, right, strict=True)]


def _broadcast_dim(one: _Dim, other: _Dim) -> _Dim:
    if one == 1:
        return other
    if other == 1 or one == other:
        return one
    # A number above 1 decides against a symbol; two different symbols decide nothing.
    if isinstance(one, int):
        return one
    return other if isinstance(other, int) else None


def _matmul(one: list[_Dim] | None, other: list[_Dim] | None) -> list[_Dim] | None:
    """Shape of a matrix product with NumPy's rules for vectors and batches."""
    if not one or not other:
        return None
    if len(other) == 1:
        return one[:-1]
    if len(one) == 1:
        return [*other[:-2], other[-1]]
    batch = _broadcast(one[:-2], other[:-2])
    return None if batch is None else [*batch, one[-2], other[-1]]


def _same_as_input(index: int) -> ShapeRule:
    def rule(node: ir.Node) -> list[_Output]:
        return [(_dtype(node, index), _shape(_dims(node, index)))]

    return rule


# --- activations and elementwise --------------------------------------------------------------------------------

SHAPES.add(
    _same_as_input(0),
    *("BiasAdd", "BiasGelu", "BiasSoftmax", "FastGelu", "Gelu", "GroupNorm", "Inverse", "QLinearLeakyRelu"),
    *("QLinearSigmoid", "QLinearSoftmax", "QuickGelu", "RotaryEmbedding", "Trilu"),
    domain=_MS,
)


# ONNX infers it through its function body, and gives up where the batch or the image size is symbolic.
SHAPES.add(_same_as_input(0), "GroupNormalization")


# ONNX infers all bins where `onesided` is left out, though its default is 1.
@SHAPES.register("STFT")
def _stft(node: ir.Node) -> list[_Output]:
    # signal (B, samples, parts) and frames of `length` samples -> (B, frames, bins, 2)
    dims, window = _dims(node, 0), _dims(node, 2)
    step, given = _integer(node, 1), _integer(node, 3)
    length = given if given is not None or window is None else window[0]
    if dims is None:
        return [(_dtype(node, 0), None)]
    frames: _Dim = None
    if isinstance(dims[1], int) and isinstance(length, int) and step:
        frames = (dims[1] - length) // step + 1
    bins = None
    if isinstance(length, int):
        bins = length // 2 + 1 if _int(node, "onesided", 1) else length
    return [(_dtype(node, 0), _shape([dims[0], frames, bins, 2]))]


@SHAPES.register("QLinearAdd", "QLinearMul", domain=_MS)
def _qlinear_binary(node: ir.Node) -> list[_Output]:
    # A, A_scale, A_zero_point, B, B_scale, B_zero_point, C_scale, C_zero_point
    return [(_dtype(node, 0), _shape(_broadcast(_dims(node, 0), _dims(node, 3))))]


@SHAPES.register("QLinearWhere", domain=_MS)
def _qlinear_where(node: ir.Node) -> list[_Output]:
    # condition, X, X_scale, X_zero_point, Y, Y_scale, Y_zero_point, Z_scale, Z_zero_point
    branches = _broadcast(_dims(node, 1), _dims(node, 4))
    return [(_dtype(node, 1), _shape(_broadcast(_dims(node, 0), branches)))]


@SHAPES.register("QLinearConcat", domain=_MS)
def _qlinear_concat(node: ir.Node) -> list[_Output]:
    # Y_scale, Y_zero_point, then (X, X_scale, X_zero_point) for each input
    parts = [_dims(node, index) for index in range(2, len(node.inputs), 3)]
    dtype = _dtype(node, 1)
    known = [dims for dims in parts if dims is not None]
    if not known or len(known) != len(parts) or len({len(dims) for dims in known}) != 1:
        return [(dtype, None)]
    axis = _int(node, "axis", 0) % len(known[0])
    sizes = [dims[axis] for dims in known]
    joined = list(known[0])
    joined[axis] = sum(s for s in sizes if isinstance(s, int)) if all(isinstance(s, int) for s in sizes) else None
    return [(dtype, _shape(joined))]


@SHAPES.register("QuantizeLinear", domain=_MS)
def _quantize(node: ir.Node) -> list[_Output]:
    return [(_dtype(node, 2) or ir.DataType.UINT8, _shape(_dims(node, 0)))]


@SHAPES.register("DequantizeLinear", domain=_MS)
def _dequantize(node: ir.Node) -> list[_Output]:
    return [(_dtype(node, 1) or ir.DataType.FLOAT, _shape(_dims(node, 0)))]


# --- matrix products --------------------------------------------------------------------------------------------


def _transposed(dims: list[_Dim] | None, *, swap: bool, batch_last: bool = False) -> list[_Dim] | None:
    if dims is None or len(dims) < 2:
        return dims
    if batch_last:
        # "transBatch": the first dimension moves before the last one.
        dims = [*dims[1:-1], dims[0], dims[-1]]
    return [*dims[:-2], dims[-1], dims[-2]] if swap else dims


@SHAPES.register("FusedMatMul", "TransposeMatMul", domain=_MS)
def _fused_matmul(node: ir.Node) -> list[_Output]:
    one = _transposed(_dims(node, 0), swap=bool(_int(node, "transA", 0)), batch_last=bool(_int(node, "transBatchA", 0)))
    other = _transposed(
        _dims(node, 1), swap=bool(_int(node, "transB", 0)), batch_last=bool(_int(node, "transBatchB", 0))
    )
    return [(_dtype(node, 0), _shape(_matmul(one, other)))]


@SHAPES.register("DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain=_MS)
def _matmul_to_float(node: ir.Node) -> list[_Output]:
    # A, B, then a scale, whose type the result has.
    return [(_dtype(node, 2) or ir.DataType.FLOAT, _shape(_matmul(_dims(node, 0), _dims(node, 1))))]


@SHAPES.register("MatMulNBits", domain=_MS)
def _matmul_nbits(node: ir.Node) -> list[_Output]:
    dims = _dims(node, 0)
    return [(_dtype(node, 0), None if not dims else _shape([*dims[:-1], _int(node, "N", 0)]))]


@SHAPES.register("FusedGemm", domain=_MS)
def _fused_gemm(node: ir.Node) -> list[_Output]:
    return [(_dtype(node, 0), _gemm(node, 0, 1))]


@SHAPES.register("QGemm", domain=_MS)
def _qgemm(node: ir.Node) -> list[_Output]:
    # A, a_scale, a_zero_point, B, b_scale, b_zero_point, C, y_scale, y_zero_point
    return [(_dtype(node, 8) or ir.DataType.FLOAT, _gemm(node, 0, 3))]


def _gemm(node: ir.Node, first: int, second: int) -> ir.Shape | None:
    one = _transposed(_dims(node, first), swap=bool(_int(node, "transA", 0)))
    other = _transposed(_dims(node, second), swap=bool(_int(node, "transB", 0)))
    return None if one is None or other is None else _shape([one[0], other[1]])


# --- convolution and pooling ------------------------------------------------------------------------------------


@SHAPES.register("FusedConv", domain=_MS)
def _fused_conv(node: ir.Node) -> list[_Output]:
    weight = _dims(node, 1)
    return [(_dtype(node, 0), None if weight is None else _windows(node, _dims(node, 0), weight[0], weight[2:]))]


@SHAPES.register("QLinearConv", domain=_MS)
def _qlinear_conv(node: ir.Node) -> list[_Output]:
    # x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point, B; "channels_last" is N, spatial, C.
    weight = _dims(node, 3)
    shape = None if weight is None else _windows(node, _dims(node, 0), weight[0], weight[2:])
    return [(_dtype(node, 7), shape)]


@SHAPES.register("MaxPool", "AveragePool", "LpPool")
def _pool(node: ir.Node) -> list[_Output]:
    """Before opset 22, ONNX counts a last window of `ceil_mode` that lies in the padding alone; no runtime does."""
    dims = _dims(node, 0)
    channels = None if dims is None else dims[1]
    shape = _windows(node, dims, channels, _ints(node, "kernel_shape"))
    return [(_dtype(node, 0), shape), (ir.DataType.INT64, shape)]


@SHAPES.register("NhwcMaxPool", domain=_MS)
def _nhwc_max_pool(node: ir.Node) -> list[_Output]:
    dims = _dims(node, 0)
    channels = None if dims is None else dims[-1]
    return [(_dtype(node, 0), _windows(node, dims, channels, _ints(node, "kernel_shape"), channels_last=True))]


@SHAPES.register("QLinearAveragePool", domain=_MS)
def _qlinear_average_pool(node: ir.Node) -> list[_Output]:
    dims = _dims(node, 0)
    channels = None if dims is None else dims[-1 if _int(node, "channels_last", 0) else 1]
    return [(_dtype(node, 0), _windows(node, dims, channels, _ints(node, "kernel_shape")))]


@SHAPES.register("QLinearGlobalAveragePool", domain=_MS)
def _qlinear_global_pool(node: ir.Node) -> list[_Output]:
    dims = _dims(node, 0)
    if dims is None:
        return [(_dtype(node, 0), None)]
    ones: list[_Dim] = [1] * (len(dims) - 2)
    pooled = [dims[0], *ones, dims[-1]] if _int(node, "channels_last", 0) else [dims[0], dims[1], *ones]
    return [(_dtype(node, 0), _shape(pooled))]


def _windows(
    node: ir.Node,
    dims: list[_Dim] | None,
    channels: _Dim,
    kernel: Sequence[_Dim] | None,
    *,
    channels_last: bool = False,
) -> ir.Shape | None:
    """Shape of what windows sliding over the spatial axes give, by the formulas of ONNX's Conv and MaxPool."""
    if dims is None or kernel is None:
        return None
    channels_last = channels_last or bool(_int(node, "channels_last", 0))
    spatial = dims[1:-1] if channels_last else dims[2:]
    rank = len(spatial)
    if len(kernel) != rank:
        return None
    strides = _ints(node, "strides") or (1,) * rank
    dilations = _ints(node, "dilations") or (1,) * rank
    pads = _ints(node, "pads") or (0,) * (2 * rank)
    auto_pad = _text(node, "auto_pad", "NOTSET")
    sizes: list[_Dim] = []
    for axis, (size, window) in enumerate(zip(spatial, kernel, strict=True)):
        if not isinstance(size, int) or not isinstance(window, int):
            sizes.append(None)
        elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            sizes.append(math.ceil(size / strides[axis]))
        else:
            padding = 0 if auto_pad == "VALID" else pads[axis] + pads[axis + rank]
            room = size + padding - dilations[axis] * (window - 1) - 1
            before = 0 if auto_pad == "VALID" else pads[axis]
            sizes.append(_num_windows(room, strides[axis], size + before, is_ceil=bool(_int(node, "ceil_mode", 0))))
    return _shape([dims[0], *sizes, channels] if channels_last else [dims[0], channels, *sizes])


def _num_windows(room: int, stride: int, end: int, *, is_ceil: bool) -> int:
    """Steps that fit into `room`, and the start; a window that `ceil_mode` adds counts if it begins before `end`."""
    if not is_ceil:
        return room // stride + 1
    count = math.ceil(room / stride) + 1
    return count - 1 if (count - 1) * stride >= end else count


@SHAPES.register("QLinearReduceMean", domain=_MS)
def _qlinear_reduce_mean(node: ir.Node) -> list[_Output]:
    dims = _dims(node, 0)
    if dims is None:
        return [(_dtype(node, 0), None)]
    axes = {axis % len(dims) for axis in _ints(node, "axes") or range(len(dims))}
    if _int(node, "keepdims", 1):
        return [(_dtype(node, 0), _shape([1 if axis in axes else dim for axis, dim in enumerate(dims)]))]
    return [(_dtype(node, 0), _shape([dim for axis, dim in enumerate(dims) if axis not in axes]))]


# --- normalization ----------------------------------------------------------------------------------------------


@SHAPES.register("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=_MS)
def _skip_layer_norm(node: ir.Node) -> list[_Output]:
    # output, mean, inv_std_var, input_skip_bias_sum
    dims, dtype = _dims(node, 0), _dtype(node, 0)
    statistics = None if dims is None else _shape([*dims[:-1], 1])
    statistic: _Output = (ir.DataType.FLOAT, statistics)
    return [(dtype, _shape(dims)), statistic, statistic, (dtype, _shape(dims))]


@SHAPES.register("LayerNormalization", "SimplifiedLayerNormalization")
@SHAPES.register("LayerNormalization", "SimplifiedLayerNormalization", domain=_MS)
def _layer_norm(node: ir.Node) -> list[_Output]:
    # ONNX Runtime registers these in ONNX's own domain as well. Y, then mean and inv_std_dev over axes from `axis` on.
    dims = _dims(node, 0)
    if dims is None:
        return [(_dtype(node, 0), None)]
    axis = _int(node, "axis", -1) % len(dims)
    ones: list[_Dim] = [1] * (len(dims) - axis)
    statistics = _shape([*dims[:axis], *ones])
    return [(_dtype(node, 0), _shape(dims)), (ir.DataType.FLOAT, statistics), (ir.DataType.FLOAT, statistics)]


@SHAPES.register("EmbedLayerNormalization", domain=_MS)
def _embed_layer_norm(node: ir.Node) -> list[_Output]:
    # input_ids (B, S), segment_ids, word_embedding (V, H), ... -> output (B, S, H), mask_index (B,), embedding_sum
    ids, table = _dims(node, 0), _dims(node, 2)
    if ids is None or table is None:
        return [(_dtype(node, 2), None)]
    hidden = _shape([*ids, table[1]])
    return [(_dtype(node, 2), hidden), (ir.DataType.INT32, _shape([ids[0]])), (_dtype(node, 2), hidden)]


# --- attention --------------------------------------------------------------------------------------------------


@SHAPES.register("Attention", domain=_MS)
def _attention(node: ir.Node) -> list[_Output]:
    return [(_dtype(node, 0), _attention_shape(node)), (_dtype(node, 0), None)]


@SHAPES.register("QAttention", domain=_MS)
def _qattention(node: ir.Node) -> list[_Output]:
    # input, weight, bias, input_scale, ...: integers come in, the type of the scale goes out
    return [(_dtype(node, 3), _attention_shape(node)), (_dtype(node, 3), None)]


def _attention_shape(node: ir.Node) -> ir.Shape | None:
    # input (B, S, D), weight (D, Q + K + V), with equal parts unless qkv_hidden_sizes says otherwise
    dims, weight = _dims(node, 0), _dims(node, 1)
    if dims is None or len(dims) != 3:
        return None
    sizes = _ints(node, "qkv_hidden_sizes")
    if sizes:
        return _shape([dims[0], dims[1], sizes[2]])
    columns = None if weight is None else weight[-1]
    return _shape([dims[0], dims[1], columns // 3 if isinstance(columns, int) else None])


@SHAPES.register("MultiHeadAttention", domain=_MS)
def _multi_head_attention(node: ir.Node) -> list[_Output]:
    """Query (B, S, H) or packed (B, S, N, 3, h); value (B, T, Hv) or (B, N, T, h). Output: (B, S, Hv)."""
    query, value = _dims(node, 0), _dims(node, 2)
    dtype = _dtype(node, 0)
    if query is None:
        return [(dtype, None)]
    hidden: _Dim = None
    if len(query) == 5:
        hidden = _product(query[2], query[4])
    elif value is not None:
        hidden = _product(value[1], value[3]) if len(value) == 4 else value[-1]
    elif _value(node, 1) is not None:
        key = _dims(node, 1)
        # Key and value packed as (B, T, N, 2, h)
        hidden = _product(key[2], key[4]) if key is not None and len(key) == 5 else None
    return [(dtype, _shape([query[0], query[1], hidden])), (dtype, None), (dtype, None)]


@SHAPES.register("GroupQueryAttention", domain=_MS)
def _group_query_attention(node: ir.Node) -> list[_Output]:
    """Query (B, S, N * h), or packed (B, S, (N + 2 * Nkv) * h); present key and value (B, Nkv, T, h)."""
    query, past = _dims(node, 0), _dims(node, 3)
    dtype = _dtype(node, 0)
    if query is None:
        return [(dtype, None)]
    hidden = query[-1]
    heads, kv_heads = _int(node, "num_heads", 0), _int(node, "kv_num_heads", 0)
    if _value(node, 1) is None:
        hidden = hidden // (heads + 2 * kv_heads) * heads if isinstance(hidden, int) and heads and kv_heads else None
    size = hidden // heads if isinstance(hidden, int) and heads else (None if past is None else past[-1])
    present = _shape([query[0], kv_heads, None, size]) if kv_heads else None
    return [(dtype, _shape([*query[:-1], hidden])), (dtype, present), (dtype, present)]


def _product(one: _Dim, other: _Dim) -> _Dim:
    return one * other if isinstance(one, int) and isinstance(other, int) else None


# --- recurrences ------------------------------------------------------------------------------------------------


@SHAPES.register("DynamicQuantizeLSTM", domain=_MS)
def _dynamic_quantize_lstm(node: ir.Node) -> list[_Output]:
    # X (S, B, I) -> Y (S, D, B, H), Y_h and Y_c (D, B, H)
    dims, hidden = _dims(node, 0), _int(node, "hidden_size", 0)
    if dims is None or len(dims) != 3 or not hidden:
        return [(ir.DataType.FLOAT, None)]
    directions = 2 if _text(node, "direction", "forward") == "bidirectional" else 1
    state: _Output = (ir.DataType.FLOAT, _shape([directions, dims[1], hidden]))
    return [(ir.DataType.FLOAT, _shape([dims[0], directions, dims[1], hidden])), state, state]
