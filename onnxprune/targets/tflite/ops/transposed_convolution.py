"""ConvTranspose and Col2Im.

    TRANSPOSE_CONV       x (N, H, W, in), filters (out, kH, kW, in)
    CONV_3D_TRANSPOSE    x (N, D, H, W, in), filters (kD, kH, kW, out, in)

Both take the output's shape as their first input, have no dilation, and know one group. Along each axis the whole
product has (size - 1) * stride + extent elements; ONNX drops the first `begin` and drops or appends some behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Constant, Tensor
from onnxprune.targets.tflite.ops.convolution import convolved, with_row, without_row
from onnxprune.targets.tflite.ops.sizes import slice_of
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView
from onnxprune.targets.tflite.ops.windows import Cut, Window, channels_first, channels_last, cut

# A group that has an operator of its own costs a slice and a share of the concatenation as well. Convolving the input
# with zeros between its elements costs the square of the stride.
_MOST_SPLIT_GROUPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One spatial axis of a transposed convolution."""

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    begin: int = 0
    """Elements dropped in front."""
    behind: int = 0
    """Elements appended behind; dropped where negative."""

    @property
    def extent(self) -> int:
        """From the first element of the kernel to its last."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def grown(self) -> int:
        """What the output has more than size * stride."""
        return self.extent - self.stride - self.begin + self.behind

    @property
    def output(self) -> int:
        """Elements of the output; -1 where only the run knows it."""
        return -1 if self.size < 0 else self.size * self.stride + self.grown

    @property
    def is_same(self) -> bool:
        """True when TFLite's SAME drops just so."""
        return self.grown == 0 and self.begin == max(self.extent - self.stride, 0) // 2

    @property
    def is_valid(self) -> bool:
        """True when nothing is dropped."""
        return self.begin == 0 and self.behind >= 0

    def whole(self) -> Growth:
        """Nothing dropped."""
        return self.changed(begin=0, behind=max(self.behind, 0))

    def changed(self, *, begin: int, behind: int, dilation: int | None = None, kernel: int | None = None) -> Growth:
        """With other borders, or another kernel."""
        return Growth(
            size=self.size,
            kernel=self.kernel if kernel is None else kernel,
            stride=self.stride,
            dilation=self.dilation if dilation is None else dilation,
            begin=begin,
            behind=behind,
        )


_POINT = Growth(size=1, kernel=1)


@TFLITE.register("ConvTranspose")
def conv_transpose(node: NodeView, build: Builder) -> Tensor:
    """A transposed convolution, with a slice behind it where its borders are not those of SAME or VALID."""
    x, weight = node.input(0), node.input(1)
    growths = _growths(node, x.shape[2:], weight.shape[2:])
    return convolved_transposed(build, x, weight, node.optional(2), growths, group=node.integer("group", 1))


@TFLITE.register("Col2Im")
def col2im(node: NodeView, build: Builder) -> Tensor:
    """A transposed convolution, whose filter for each element of the block is 1 at its place and 0 elsewhere."""
    x = node.input(0)
    image = [int(size) for size in node.required_array(1, "image's sizes")]
    block = [int(size) for size in node.required_array(2, "block's sizes")]
    rank = len(image)
    ones, zeros = (1,) * rank, (0,) * (2 * rank)
    strides, dilations = node.ints("strides", ones), node.ints("dilations", ones)
    pads = node.ints("pads", zeros)
    growths = []
    for axis in range(rank):
        extent = (block[axis] - 1) * dilations[axis] + 1
        size = (image[axis] + pads[axis] + pads[axis + rank] - extent) // strides[axis] + 1
        behind = image[axis] + pads[axis] - (size - 1) * strides[axis] - extent
        growths.append(
            Growth(
                size=size,
                kernel=block[axis],
                stride=strides[axis],
                dilation=dilations[axis],
                begin=pads[axis],
                behind=behind,
            )
        )
    elements = int(np.prod(block))
    if x.shape[1] < 0:
        raise UnsupportedError("the number of its channels is not known")
    channels = x.shape[1] // elements
    columns = build.reshaped(
        x, (x.shape[0] * channels if x.shape[0] >= 0 else -1, elements, *(one.size for one in growths))
    )
    weight = build.constant(np.eye(elements, dtype=np.float32).reshape(elements, 1, *block))
    y = convolved_transposed(build, columns, weight, None, growths)
    return build.reshaped(y, (x.shape[0], channels, *image))


def _growths(node: NodeView, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[Growth, ...]:
    rank = len(sizes)
    if -1 in kernel:
        raise UnsupportedError("the size of its kernel is not known")
    ones, auto_pad = (1,) * rank, node.text("auto_pad", "NOTSET")
    strides, dilations = node.ints("strides") or ones, node.ints("dilations") or ones
    appended = node.ints("output_padding") or (0,) * rank
    pads = (node.ints("pads") if auto_pad == "NOTSET" else ()) or (0,) * (2 * rank)
    # Older exporters write N and C as well.
    wanted = node.ints("output_shape")[-rank:]
    if any(appended) and auto_pad.startswith("SAME"):
        raise UnsupportedError("runtimes disagree on auto_pad with output_padding; write the padding as 'pads'")
    found = []
    for axis in range(rank):
        plain = Growth(
            size=sizes[axis],
            kernel=kernel[axis],
            stride=strides[axis],
            dilation=dilations[axis],
            begin=pads[axis],
            behind=appended[axis] - pads[axis + rank],
        )
        if wanted and plain.size < 0:
            raise UnsupportedError("its output_shape is fixed, and the size of its input is not")
        # How much of the whole product is dropped. Where a stride is longer than the kernel, SAME drops nothing.
        total = max(plain.extent - plain.stride, 0) if auto_pad.startswith("SAME") else 0
        if wanted:
            total = plain.changed(begin=0, behind=appended[axis]).output - wanted[axis]
        if wanted or auto_pad.startswith("SAME"):
            dropped = max(total, 0)
            begin = dropped // 2 if auto_pad == "SAME_UPPER" else dropped - dropped // 2
            plain = plain.changed(begin=begin, behind=appended[axis] - total + begin)
        found.append(plain)
    return tuple(found)


def convolved_transposed(
    build: Builder, x: Tensor, weight: Tensor, bias: Tensor | None, growths: Sequence[Growth], *, group: int = 1
) -> Tensor:
    """The transposed convolution of x (N, C, space) with weight (C, out / group, kernel), as (N, out, space)."""
    out = weight.shape[1] * group
    if bias is None:
        bias = build.constant(np.zeros(out, np.float32))
    if any(growth.dilation > 1 for growth in growths):
        weight = _dilated(build, weight, [1, 1, *(growth.dilation for growth in growths)])
        growths = [
            growth.changed(begin=growth.begin, behind=growth.behind, dilation=1, kernel=growth.extent)
            for growth in growths
        ]
    is_split = 1 < group <= _MOST_SPLIT_GROUPS and len(growths) < 3
    if group > 1 and not is_split:
        return _by_zeros_between(build, x, weight, bias, growths, group)
    if not 1 <= len(growths) <= 3:
        raise UnsupportedError(f"TFLite convolves over 1 to 3 axes, and it has {len(growths)}")
    last = build.transposed(x, channels_last(x.rank))
    is_row = len(growths) == 1
    if is_row:
        last, weight, growths = with_row(build, last, 1), with_row(build, weight, 2), (_POINT, *growths)
    y = _whole(build, last, weight, bias, growths) if group == 1 else _split(build, last, weight, bias, growths, group)
    if is_row:
        y = without_row(build, y, 1)
    return build.transposed(y, channels_first(y.rank))


def _split(build: Builder, last: Tensor, weight: Tensor, bias: Tensor, growths: Sequence[Growth], group: int) -> Tensor:
    """Each group by itself, and all side by side."""
    channels, out = weight.shape[0] // group, weight.shape[1]
    axis = last.rank - 1
    parts = build.ops(
        "SPLIT",
        [build.constant(np.array(axis, np.int32)), last],
        outputs=[((*last.shape[:-1], channels), last.type)] * group,
        numSplits=group,
    )
    results = [
        _whole(
            build,
            part,
            slice_of(build, weight, 0, index * channels, channels),
            slice_of(build, bias, 0, index * out, out),
            growths,
        )
        for index, part in enumerate(parts)
    ]
    shape = (*results[0].shape[:-1], out * group)
    return build.op("CONCATENATION", results, shape=shape, type_=last.type, axis=axis)


def _whole(build: Builder, last: Tensor, weight: Tensor, bias: Tensor, growths: Sequence[Growth]) -> Tensor:
    """In one group, of x and to y with channels last."""
    padding, made = "VALID", list(growths)
    if all(growth.is_same for growth in growths):
        padding = "SAME"
    elif not all(growth.is_valid for growth in growths):
        made = [growth.whole() for growth in growths]
    out = weight.shape[1]
    is_volume = len(growths) == 3
    # (in, out, kernel) -> (out, kernel, in), or (kernel, out, in)
    filters = build.transposed(weight, (2, 3, 4, 1, 0) if is_volume else (1, 2, 3, 0))
    options = {f"stride{axis}": growth.stride for axis, growth in zip("DHW"[-len(growths) :], growths, strict=True)}
    y = build.op(
        "CONV_3D_TRANSPOSE" if is_volume else "TRANSPOSE_CONV",
        [_output_shape(build, last, made, out), filters, last, bias],
        shape=(last.shape[0], *(growth.output for growth in made), out),
        type_=last.type,
        padding=padding,
        **options,
    )
    cuts = {
        axis: Cut(begin=wanted.begin, behind=max(-wanted.behind, 0))
        for axis, (wanted, given) in enumerate(zip(growths, made, strict=True), start=1)
        if wanted != given
    }
    return cut(build, y, cuts)


def _output_shape(build: Builder, last: Tensor, growths: Sequence[Growth], out: int) -> Tensor:
    """The output's shape: a constant where all is known, else (N, size, in) * (1, stride, 0) + (0, grown, out)."""
    if last.is_static:
        return build.constant([last.shape[0], *(growth.output for growth in growths), out])
    factors = build.constant([1, *(growth.stride for growth in growths), 0])
    terms = build.constant([0, *(growth.grown for growth in growths), out])
    return build.binary("ADD", build.binary("MUL", build.shape_of(last), factors), terms)


def _by_zeros_between(
    build: Builder, x: Tensor, weight: Tensor, bias: Tensor, growths: Sequence[Growth], group: int
) -> Tensor:
    """A plain convolution in groups with the kernel turned around, of the input with zeros between its elements."""
    x = _dilated(build, x, [1, 1, *(growth.stride for growth in growths)])
    windows, cuts = [], {}
    for axis, growth in enumerate(growths, start=2):
        begin, end = growth.extent - 1 - growth.begin, growth.extent - 1 + growth.behind
        windows.append(Window(size=x.shape[axis], kernel=growth.kernel, begin=max(begin, 0), end=max(end, 0)))
        if begin < 0 or end < 0:
            cuts[axis] = Cut(begin=max(-begin, 0), behind=max(-end, 0))
    # (g * in, out, kernel) -> (g * out, in, kernel)
    kernel = weight.shape[2:]
    inputs, outputs = weight.shape[0] // group, weight.shape[1]
    filters = build.reshaped(weight, (group, inputs, outputs, *kernel))
    filters = build.transposed(filters, (0, 2, 1, *range(3, filters.rank)))
    filters = build.reshaped(filters, (group * outputs, inputs, *kernel))
    y = convolved(build, x, _turned(build, filters), bias, windows, group=group)
    return cut(build, y, cuts)


def _turned(build: Builder, filters: Tensor) -> Tensor:
    """The kernel's axes the other way round."""
    axes = tuple(range(2, filters.rank))
    if filters.constant is not None:
        turned = filters.constant.mapped(lambda array: np.ascontiguousarray(np.flip(array, axes)))
        return build.constant_tensor(turned, name=f"{filters.name}/turned")
    return build.op("REVERSE_V2", [filters, build.constant(list(axes))], shape=filters.shape, type_=filters.type)


def _dilated(build: Builder, x: Tensor, factors: Sequence[int]) -> Tensor:
    """With zeros between the elements: DILATE."""
    if all(factor == 1 for factor in factors):
        return x
    shape = tuple(dim if dim < 0 else (dim - 1) * factor + 1 for dim, factor in zip(x.shape, factors, strict=True))
    if x.constant is not None:
        narrow = x.constant

        def load() -> np.ndarray:
            wide = np.zeros(shape, narrow.dtype)
            wide[tuple(slice(None, None, factor) for factor in factors)] = narrow.load()
            return wide

        return build.constant_tensor(Constant(shape, narrow.dtype, load), name=f"{x.name}/dilated")
    zero = build.constant(np.zeros((), np.float32))
    return build.op("DILATE", [x, build.constant(list(factors)), zero], shape=shape, type_=x.type)
