"""Where x86 without VNNI saturates: sums of two uint8 * int8 products that don't fit into 16 bits.

ONNX Runtime's kernels for uint8 activations and int8 weights (MLAS: GEMM and GEMV for SSE 4.1, AVX2 and AVX-512 without
VNNI, and the direct convolution for AVX2 and AVX-512) multiply by VPMADDUBSW:

    s[j] = saturate16(a[2j] * w[2j] + a[2j+1] * w[2j+1]),    a in 0..255 as stored (the zero point is subtracted later)

and add the s[j] exactly, in 32 bits (VPMADDWD by ones). So what matters are the pairs of *neighbours* along the axis
that is summed over, counted from its beginning, in the kernel's order:

    Conv            (kernel position, input channel of the group); also where the model is channels-first, since
                    QLinearConv brings the input to channels-last and the weights with it
    Gemm, MatMul    the rows of the (K, N) matrix
    depthwise Conv  none: one input and one output channel a group are multiplied in 32 bits, exactly

A spelling may give a convolution zero channels or merge its groups, which moves an odd number of channels against the
pairs, and write a ConvTranspose as a Conv. All pairs that can come of that count, so that what is safe stays safe.

Packing pads K to a multiple of 4 with zeros and cuts it at multiples of 4, so it never changes the pairs. With a at
most 255 a pair can't saturate where the positive weights in it sum up to at most 128 and the negative ones to no less
than -128: 255 * 128 = 32640. Weights of 7 bits always fulfil this, most pairs of 8-bit weights do, too.

Kernels with VNNI (VPDPBUSD) add four products in 32 bits, and those of ARM as well: nothing here applies to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxprune.contracts import ActivationQuantization, Finding, ModelState, Placement, QuantizationPlan
from onnxprune.graph.weights import constant_array
from onnxprune.ops.affine import largest_symmetric_integer, quantize_array
from onnxprune.ops.planned import PlannedNode, planned_nodes

__all__ = [
    "LARGEST_SAFE_PAIR",
    "LayerSaturation",
    "paired_weights",
    "saturating_layers",
    "saturation_finding",
    "saturation_findings",
    "unsaturated_scales",
]

LARGEST_SAFE_PAIR = 128
"""The largest sum of two weights of one sign whose products with uint8 always fit into 16 bits."""

_INT16 = np.iinfo(np.int16)
_MAX_NAMED_LAYERS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSaturation:
    """What VPMADDUBSW could do to one layer with the plan's full weight range.

    `lowest_sum` and `highest_sum` are the extreme sums of a pair over all uint8 activations, the calibrated ones over
    the activations that calibration saw; 16 bits end at -32768 and 32767.
    """

    node: str
    op_type: str
    num_channels: int
    unsafe_channels: int
    """Output channels with a pair that some activations saturate."""
    lowest_sum: int
    highest_sum: int
    calibrated_lowest_sum: int
    calibrated_highest_sum: int

    @property
    def can_saturate(self) -> bool:
        """False: no uint8 activations whatever make a pair saturate."""
        return self.unsafe_channels > 0

    @property
    def can_saturate_as_calibrated(self) -> bool:
        """True when activations within the calibrated range make a pair saturate."""
        return self.calibrated_highest_sum > _INT16.max or self.calibrated_lowest_sum < _INT16.min

    @property
    def overshoot(self) -> float:
        """The most extreme sum as a multiple of what 16 bits hold."""
        return max(self.highest_sum / _INT16.max, self.lowest_sum / _INT16.min)


def paired_weights(node: ir.Node, integers: npt.NDArray[np.integer]) -> npt.NDArray[np.int32] | None:
    """The integers of a weight as (output channels, pairs, 2), paired as the kernel of `node` pairs them.

    An odd end is paired with 0. None where the kernel adds in 32 bits. A stack of matrices gives one row for each
    column of each matrix. An odd number of channels gives more than one set of pairs (see the top of this file).
    """
    return _pairs_in_kernel_order(node, integers) if _adds_pairs(node, integers.shape) else None


def unsaturated_scales(
    weight: ir.Value,
    array: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    *,
    axis: int | None,
    num_bits: int,
) -> npt.NDArray[np.float32]:
    """`scales`, widened channel by channel until no pair can saturate in any node that reads `weight`.

    A channel that can't saturate keeps its scale, so its integers are those of every other spelling. The others are
    widened by the little that their largest pair exceeds the limit, at most to what 7 bits would give (unless the
    scale saturates weights itself).

    Args:
        weight: Its readers decide which numbers meet in a pair.
        array: The numbers of the weight.
        scales: One, or one for each index of `axis`.
        axis: The axis with a scale for each index.
        num_bits: Bits of the integers.
    """
    readers = tuple(dict.fromkeys(use.node for use in weight.uses()))
    largest = largest_symmetric_integer(num_bits)
    if 2 * largest <= LARGEST_SAFE_PAIR:
        return scales
    readers = tuple(node for node in readers if _adds_pairs(node, array.shape))
    # Where each scale is that of an output channel, a channel that is safe needs no further look.
    by_channel = axis is not None and all(_output_axis(node, array.ndim) == axis for node in readers)
    widened = scales.astype(np.float32)
    channels, part = np.arange(widened.size), array
    while True:
        current = widened[channels]
        integers = quantize_array(part, current.tolist(), axis=axis, smallest=-largest, largest=largest, dtype=np.int8)
        sums = _largest_pairs(readers, integers, axis, current.size)
        unsafe = sums > LARGEST_SAFE_PAIR
        if not np.any(unsafe):
            return widened
        # A sum above 128 is 129 at least, so that each round widens by 0.8 % or more; two or three are usual.
        widened[channels] = (current * np.maximum(sums / LARGEST_SAFE_PAIR, 1.0)).astype(np.float32)
        if by_channel and axis is not None and not np.all(unsafe):
            channels, part = channels[unsafe], np.compress(unsafe, part, axis=axis)


def saturating_layers(model: ir.Model, plan: QuantizationPlan, placement: Placement) -> tuple[LayerSaturation, ...]:
    """For every integer layer with weights whose kernel adds in 16 bits, what could happen to the plan's integers.

    Layers in graph order. Depthwise convolutions are left out: their kernels are exact.
    """
    integer = set(placement.integer_nodes)
    found = []
    for item in planned_nodes(model, plan):
        if item.weight is None or item.node.name not in integer:
            continue
        layer = _layer_saturation(item, plan)
        if layer is not None:
            found.append(layer)
    return tuple(found)


def saturation_finding(
    model: ir.Model, plan: QuantizationPlan, placement: Placement, *, widens_scales: bool
) -> Finding | None:
    """Which layers are concerned, for the report; None where no layer adds in 16 bits.

    Args:
        model: The float model.
        plan: Its plan.
        placement: Which nodes are integer.
        widens_scales: True where the spelling does what keeps them exact ("x86"), False where it relies on VNNI.
    """
    layers = saturating_layers(model, plan, placement)
    if not layers:
        return None
    unsafe = sorted((layer for layer in layers if layer.can_saturate), key=lambda layer: -layer.overshoot)
    if not unsafe:
        return Finding(
            topic="16-bit saturation",
            text=f"None of the {len(layers)} layers with 8-bit weights can saturate on x86 without VNNI: they are "
            "exact there, with their full weight range.",
        )
    shown = ", ".join(f"'{layer.node}' ({layer.overshoot:.2f}x)" for layer in unsafe[:_MAX_NAMED_LAYERS])
    more = f" and {len(unsafe) - _MAX_NAMED_LAYERS} more" if len(unsafe) > _MAX_NAMED_LAYERS else ""
    channels = sum(layer.unsafe_channels for layer in unsafe)
    total = sum(layer.num_channels for layer in layers)
    if widens_scales:
        return Finding(
            topic="16-bit saturation",
            text=f"{channels} of {total} output channels, in {len(unsafe)} of {len(layers)} layers, have wider weight "
            f"scales than the plan, so that no pair of products exceeds 16 bits on x86 without VNNI: {shown}{more}. "
            "All others have the integers of every other spelling.",
        )
    seen = sum(layer.can_saturate_as_calibrated for layer in unsafe)
    return Finding(
        topic="16-bit saturation",
        text=f"On x86 without VNNI, {len(unsafe)} of {len(layers)} layers of this artifact can saturate at 16 bits "
        f"({seen} within the calibrated ranges); the spelling 'x86' keeps them exact. By how much they can exceed the "
        f"limit: {shown}{more}.",
    )


def saturation_findings(state: ModelState, placement: Placement | None, spelling: str | None) -> tuple[Finding, ...]:
    """What x86 without VNNI does, or would do, to the int8 layers of an artifact for x86; nothing for other targets."""
    if state.quantization is None or placement is None or spelling not in ("x86", "x86-vnni"):
        return ()
    finding = saturation_finding(state.model, state.quantization, placement, widens_scales=spelling == "x86")
    return () if finding is None else (finding,)


def _adds_pairs(node: ir.Node, weight_shape: tuple[int, ...]) -> bool:
    """False where the kernel of `node` adds in 32 bits: a depthwise convolution, and what multiplies no weight."""
    if node.op_type == "Conv":
        outputs, inputs = weight_shape[:2]
        return inputs != 1 or outputs != node.attributes.get_int("group", 1)
    return node.op_type in ("ConvTranspose", "Gemm", "MatMul")


def _output_axis(node: ir.Node, rank: int) -> int:
    """The axis of a weight along which the output channels stand."""
    if node.op_type == "MatMul":
        return rank - 1
    if node.op_type == "ConvTranspose":
        return 1
    return 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) != 0 else 1


def _pairs_in_kernel_order(node: ir.Node, integers: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """`paired_weights` where pairs are added, and for some output channels of such a weight."""
    if node.op_type == "Conv":
        return _convolution_pairs(integers, node.attributes.get_int("group", 1))
    if node.op_type == "ConvTranspose":
        return _transposed_pairs(integers)
    if node.op_type == "Gemm":
        return _neighbours(integers if node.attributes.get_int("transB", 0) else integers.T)
    # MatMul: (..., K, N) -> (... * N, K)
    matrix = integers.reshape(-1, 1) if integers.ndim == 1 else integers
    return _neighbours(np.swapaxes(matrix, -1, -2).reshape(-1, matrix.shape[-2]))


def _convolution_pairs(integers: npt.NDArray[np.integer], group: int) -> npt.NDArray[np.int32]:
    outputs, inputs = integers.shape[:2]
    # (O, I/g, k...) -> (O, K positions, I/g)
    windows = np.moveaxis(integers, 1, -1).reshape(outputs, -1, inputs)
    found = [_neighbours(windows.reshape(outputs, -1))]
    if inputs % 2:
        # With zero channels behind them, the channels of a position begin a pair; in a merged group they may end one.
        for before in (0, 1) if group > 1 else (0,):
            shifted = np.pad(windows, ((0, 0), (0, 0), (before, 1 - before)))
            found.append(_neighbours(shifted.reshape(outputs, -1)))
    return np.concatenate(found, axis=1)


def _transposed_pairs(integers: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    # (I, O/g, k...) -> (O/g, K positions, I)
    windows = np.moveaxis(integers, 0, -1).reshape(integers.shape[1], -1, integers.shape[0])
    rows = windows.reshape(windows.shape[0], -1)
    if windows.shape[2] % 2 == 0:
        return _neighbours(rows)
    # Which position follows which is the spelling's choice: each weight may meet one as large as itself.
    return np.stack([rows, rows], axis=2).astype(np.int32)


def _neighbours(rows: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """(channels, K) -> (channels, K/2, 2); an odd end is paired with 0."""
    padded = np.zeros((rows.shape[0], rows.shape[1] + rows.shape[1] % 2), dtype=np.int32)
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(rows.shape[0], -1, 2)


def _largest_pairs(
    readers: Sequence[ir.Node], integers: npt.NDArray[np.integer], axis: int | None, num_scales: int
) -> npt.NDArray[np.int64]:
    """For each scale along `axis`, the largest sum of a pair's weights of one sign, over all readers."""
    largest = np.zeros(num_scales, dtype=np.int64)
    for node in readers:
        sums = _one_sign_sums(_pairs_in_kernel_order(node, integers))
        is_by_channel = axis == _output_axis(node, integers.ndim) and sums.size == num_scales
        largest = np.maximum(largest, sums if is_by_channel else sums.max(initial=0))
    return largest


def _one_sign_sums(pairs: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """For each row, the largest sum of a pair's positive weights, or of its negative ones without their sign."""
    positive = np.maximum(pairs, 0).sum(axis=2).max(axis=1, initial=0)
    negative = np.maximum(-pairs, 0).sum(axis=2).max(axis=1, initial=0)
    largest: npt.NDArray[np.int64] = np.maximum(positive, negative).astype(np.int64)
    return largest


def _layer_saturation(item: PlannedNode, plan: QuantizationPlan) -> LayerSaturation | None:
    planned = plan.weights[item.weight.name or ""] if item.weight is not None else None
    array = constant_array(item.weight)
    if planned is None or array is None:
        return None
    largest = largest_symmetric_integer(planned.num_bits)
    integers = quantize_array(
        np.asarray(array, dtype=np.float32),
        planned.scales,
        axis=planned.axis,
        smallest=-largest,
        largest=largest,
        dtype=np.int8,
    )
    pairs = paired_weights(item.node, integers)
    if pairs is None or pairs.size == 0:
        return None
    lowest, highest = _extreme_sums(pairs, 0, 255)
    low, high = _calibrated_integers(plan.activations[item.inputs[0].name or ""])
    calibrated_lowest, calibrated_highest = _extreme_sums(pairs, low, high)
    return LayerSaturation(
        node=item.node.name or "",
        op_type=item.node.op_type,
        num_channels=pairs.shape[0],
        unsafe_channels=int(np.count_nonzero(_one_sign_sums(pairs) > LARGEST_SAFE_PAIR)),
        lowest_sum=lowest,
        highest_sum=highest,
        calibrated_lowest_sum=calibrated_lowest,
        calibrated_highest_sum=calibrated_highest,
    )


def _extreme_sums(pairs: npt.NDArray[np.int32], low: int, high: int) -> tuple[int, int]:
    """The smallest and the largest sum of a pair of products, with activations from `low` to `high`."""
    positive, negative = np.maximum(pairs, 0), np.minimum(pairs, 0)
    lowest = (positive * low + negative * high).sum(axis=2).min()
    highest = (positive * high + negative * low).sum(axis=2).max()
    return int(lowest), int(highest)


def _calibrated_integers(quantization: ActivationQuantization) -> tuple[int, int]:
    """The smallest and the largest uint8 within the calibrated range; zero, which padding brings in, is among them."""
    bounds = np.array([min(quantization.range_min, 0.0), max(quantization.range_max, 0.0)]) / quantization.scale
    low, high = np.clip(np.rint(bounds) + quantization.zero_point + 128, 0, 255)
    return int(low), int(high)
