"""What layers cost in float, with ranges found in each run, and block by block, on one core.

Measured with onnxruntime 1.31 on an x86 server with AVX-512 VNNI, each layer alone against its float twin, interleaved:
100 matrix products from 1x64x10 to 1024x768x3072, and a dozen convolutions. What the figures are used for is the sign
of a difference, with a margin. Of other processors nothing was measured: ARM is taken to gain as much, and x86 without
VNNI half as much for each product; what only pays where it was measured is not used there.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.targets.qdq.spelling import SpellingName

__all__ = ["MatrixProduct", "block_wise_pays", "conv_1d_pays", "dynamic_pays"]

# Nanoseconds. A product of few rows waits for the weights to arrive from memory, which int8 makes a quarter.
_FLOAT_NS_PER_MAC = 0.021
_FLOAT_NS_PER_WEIGHT = 0.06
_INT8_NS_PER_MAC: dict[str, float] = {"x86-vnni": 0.0062, "arm64": 0.0062, "x86": 0.0136}
_INT8_NS_PER_WEIGHT = 0.022
# DynamicQuantizeLinear: the extremes, then the division.
_QUANTIZE_NS = 0.25
# int32 to float, scaled.
_RESCALE_NS = 0.25
_CALL_NS = 2000.0
_MARGIN = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixProduct:
    """(rows, summed) by (summed, columns). `rows` is 1 where the number is not known before the run."""

    rows: int
    summed: int
    columns: int


def dynamic_pays(product: MatrixProduct, spelling: SpellingName, *, readers: int = 1) -> bool:
    """True when DynamicQuantizeLinear and MatMulInteger are faster than the float product.

    Predicts 1x128x128 (0.93 measured), 16x64x64 (0.94), 196x768x16 (0.97) and 49x3x96 (0.81) to be slower, 1x256x256
    (1.1), 128x128x128 (2.2) and 196x32x768 (1.4) to be faster.

    Args:
        product: Its size.
        spelling: The processor.
        readers: How many products share one DynamicQuantizeLinear.
    """
    macs = product.rows * product.summed * product.columns
    weights = product.summed * product.columns
    float_ns = macs * _FLOAT_NS_PER_MAC + weights * _FLOAT_NS_PER_WEIGHT
    int8_ns = (
        macs * _INT8_NS_PER_MAC[spelling]
        + weights * _INT8_NS_PER_WEIGHT
        + product.rows * product.summed * _QUANTIZE_NS / readers
        + product.rows * product.columns * _RESCALE_NS
        + _CALL_NS
    )
    return float_ns >= int8_ns * _MARGIN


def conv_1d_pays(*, summed: int, channels: int, spelling: SpellingName) -> bool:
    """True when ConvInteger is faster than a float convolution along one axis.

    512 channels by 512x3 came to 1.3x (99 steps) and 1.6x (3199 steps), 512 channels of 1x10 to 0.5x. Convolutions in
    two dimensions never pay: 0.2x to 1.2x alone, and in a network they lose ONNX Runtime's blocked layout.
    """
    return spelling == "x86-vnni" and summed >= 512 and channels >= 128


def block_wise_pays(*, summed: int, columns: int, spelling: SpellingName) -> bool:
    """True when MatMulNBits with 8 bits in blocks of 128 is faster than the float product, whatever the rows.

    From 1 to 512 rows: 768x192 1.2x to 1.5x, 384x384 1.2x to 1.4x, 768x3072 1.7x to 2.6x; 192x768 0.9x to 1.3x,
    256x256 1.0x to 1.2x. Other processors may lack its kernels, and then it takes ten times as long as float.
    """
    return spelling == "x86-vnni" and summed >= 256 and summed * columns >= 1 << 17
