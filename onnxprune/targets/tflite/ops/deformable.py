"""DeformConv: the kernel's elements read at places of their own, and then a convolution over single pixels."""

from __future__ import annotations

import math

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.convolution import convolved
from onnxprune.targets.tflite.ops.sampling import Border, linear_taps, read_rows
from onnxprune.targets.tflite.ops.sizes import Size, product_of, reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView
from onnxprune.targets.tflite.ops.windows import Window, windows_of


@TFLITE.register("DeformConv")
def deform_conv(node: NodeView, build: Builder) -> Tensor:
    """All elements of all kernels are read by four GATHERs; then CONV_2D with a 1x1 kernel over C * elements.

    K elements of the kernel, P = H' * W' places of the output, and channels in groups of offsets (G, C / G):

        x (N, C, H, W) -> (N * G, H * W, C / G)
        offsets (N, G * K * 2, H', W') -> (N * G, K * P, 2)
        read (N * G, K * P, C / G) -> (N, C * K, H', W')
    """
    x, weight, offset = node.input(0), node.input(1), node.input(2)
    if x.rank != 4 or (not x.is_static and -1 in x.shape[1:]):
        raise UnsupportedError("where it reads depends on the size of its input, which only the run knows")
    windows = windows_of(node, x.shape[2:], weight.shape[2:])
    groups, elements = node.integer("offset_group", 1), math.prod(weight.shape[2:])
    channels, (height, width) = x.shape[1] // groups, x.shape[2:]
    places = math.prod(window.output for window in windows)
    batch = size_of(x, 0)
    each = product_of([batch, groups])
    table = reshaped_to(build, x, [batch, groups, channels, height * width])
    table = build.transposed(table, (0, 1, 3, 2))
    table = reshaped_to(build, table, [each, height * width, channels])
    moved = build.transposed(reshaped_to(build, offset, [each, elements, 2, places]), (0, 1, 3, 2))
    moved = reshaped_to(build, moved, [each, elements * places, 2])
    at = build.binary("ADD", moved, build.constant(_places(windows)))
    read = read_rows(build, table, linear_taps(build, at, Border(sizes=(height, width))))
    mask = node.optional(4)
    if mask is not None:
        read = build.binary("MUL", read, reshaped_to(build, mask, [each, elements * places, 1]))
    sizes: list[Size] = [batch, groups, elements, places, channels]
    columns = build.transposed(reshaped_to(build, read, sizes), (0, 1, 4, 2, 3))
    columns = reshaped_to(build, columns, [batch, x.shape[1] * elements, *(window.output for window in windows)])
    filters = build.reshaped(weight, (weight.shape[0], weight.shape[1] * elements, 1, 1))
    single = [Window(size=window.output, kernel=1) for window in windows]
    return convolved(build, columns, filters, node.optional(3), single, group=node.integer("group", 1))


def _places(windows: tuple[Window, ...]) -> np.ndarray:
    """Where each element of the kernel lies for each place of the output, without offsets: (1, K * P, 2)."""
    kernels = np.meshgrid(*(np.arange(one.kernel) * one.dilation for one in windows), indexing="ij")
    outputs = np.meshgrid(*(np.arange(one.output) * one.stride - one.begin for one in windows), indexing="ij")
    pairs = [kernel.reshape(-1, 1) + output.reshape(1, -1) for kernel, output in zip(kernels, outputs, strict=True)]
    return np.stack(pairs, axis=-1).reshape(1, -1, len(windows)).astype(np.float32)
