"""A graph whose clusters have the form that XNNPACK's sparse inference asks for, where that computes the same.

    CONV_2D, SAME, 3x3, stride 2        ->  PAD(1, 1, 1, 1) -> CONV_2D, VALID                     (1)
    DEPTHWISE_CONV_2D, SAME, stride 2   ->  PAD(k // 2 each) -> DEPTHWISE_CONV_2D, VALID          (1)
    PAD(t, l, b, r) -> a convolution    ->  PAD(k // 2 each) -> the convolution                   (1)
    ADD(x, c), MUL(x, c)                ->  ADD(c, x), MUL(c, x) with c of shape (1, 1, 1, C)
    SUB(x, c)                           ->  ADD(-c, x)
    what follows a MEAN                 ->  `pooled`

(1) Where there are as many windows, at the same places.

Nothing here is faster by itself: the form is worth it only where `qualify` then says that the cluster is computed
sparse. Numbers differ from those before by the order of sums at most.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxprune.targets.tflite.edit import Editor
from onnxprune.targets.tflite.graph import Constant, Graph, Operator, Shape, Tensor
from onnxprune.targets.tflite.sparse.pooled import with_pooled_form
from onnxprune.targets.tflite.sparse.rules import spatial_paddings

__all__ = ["to_sparse_form"]

_RANK = 4
_SLIDING = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D"})
_COMMUTATIVE = frozenset({"ADD", "MUL"})


def to_sparse_form(graph: Graph) -> Graph:
    """`graph` with every rewrite of the table above that applies."""
    editor = Editor(graph)
    for operator in graph.operators:
        if operator.kind in _SLIDING:
            _pad_by_half_the_kernel(operator, editor)
        elif operator.kind in ("ADD", "MUL", "SUB"):
            _constant_first(operator, editor)
    graph = editor.graph()
    for operator in graph.operators:
        if operator.kind == "MEAN":
            graph = with_pooled_form(graph, operator.outputs[0])
    return graph


# --- paddings -------------------------------------------------------------------------------------------------


def _pad_by_half_the_kernel(operator: Operator, editor: Editor) -> None:
    """Explicit paddings of k // 2 where the stride is 2 and all windows stay where they are."""
    x, filters = editor.tensors[operator.inputs[0]], editor.tensors[operator.inputs[1]]
    strides = (operator.option("strideH", 1), operator.option("strideW", 1))
    kernels = filters.shape[1:3]
    if strides != (2, 2) or kernels[0] != kernels[1] or kernels[0] % 2 == 0 or kernels[0] == 1:
        return
    if operator.option("dilationHFactor", 1) != 1 or operator.option("dilationWFactor", 1) != 1:
        return
    source, now = _padded_source(operator, editor)
    if source is None or now is None or -1 in source.shape[1:3]:
        return
    half = kernels[0] // 2
    wanted = (half,) * 4
    if not _same_windows(source.shape, now, wanted, kernels[0], 2):
        return
    if operator.option("padding", "SAME") == "VALID" and now == wanted and editor.only_reader(x.name) is not None:
        return
    amounts = np.array([[0, 0], [half, half], [half, half], [0, 0]], np.int32)
    paddings = editor.add_constant(Constant.of(amounts), f"{operator.outputs[0]}/paddings")
    batch, height, width, channels = source.shape
    pad, padded = editor.computed(
        "PAD",
        [source.name, paddings.name],
        name=f"{operator.outputs[0]}/padded",
        shape=(batch, height + 2 * half, width + 2 * half, channels),
        type_=source.type,
        node=operator.node,
    )
    moved = replace(operator, inputs=(padded.name, *operator.inputs[1:])).with_options(padding="VALID")
    editor.replace(operator, pad, moved)


def _padded_source(operator: Operator, editor: Editor) -> tuple[Tensor | None, tuple[int, int, int, int] | None]:
    """What is padded, and by how much: through SAME, or the PAD before."""
    x = editor.tensors[operator.inputs[0]]
    if operator.option("padding", "SAME") == "SAME":
        kernel_h, kernel_w = editor.tensors[operator.inputs[1]].shape[1:3]
        (top, bottom), (left, right) = (
            _same_padding(size, kernel, 2) for size, kernel in zip(x.shape[1:3], (kernel_h, kernel_w), strict=True)
        )
        return x, (top, left, bottom, right)
    pad = editor.producer(x.name)
    if pad is None or pad.kind != "PAD":
        return x, (0, 0, 0, 0)
    return editor.tensors[pad.inputs[0]], spatial_paddings(editor.tensors[pad.inputs[1]])


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """As TensorFlow has it: the odd one of the total goes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _same_windows(
    shape: Shape, now: tuple[int, int, int, int], wanted: tuple[int, int, int, int], kernel: int, stride: int
) -> bool:
    """True when other paddings give as many windows, at the same places."""
    return all(
        now[axis] == wanted[axis]
        and (size + now[axis] + now[axis + 2] - kernel) // stride
        == (size + wanted[axis] + wanted[axis + 2] - kernel) // stride
        for axis, size in enumerate(shape[1:3])
    )


# --- constants --------------------------------------------------------------------------------------------------


def _constant_first(operator: Operator, editor: Editor) -> None:
    """ADD and MUL with their constant in front, spread to four axes; SUB of a constant as ADD."""
    first, second = (editor.tensors[name] for name in operator.inputs)
    output = editor.tensors[operator.outputs[0]]
    constant, other = (first, second) if first.constant is not None else (second, first)
    if constant.constant is None or other.constant is not None or output.type != "FLOAT32" or other.rank != _RANK:
        return
    if operator.kind == "SUB" and constant is first:
        return
    if constant.num_elements not in (1, constant.shape[-1] if constant.shape else 1):
        return
    numbers = constant.constant.reshaped((1,) * (_RANK - 1) + (constant.num_elements,))
    if operator.kind == "SUB":
        numbers = numbers.mapped(np.negative)
    elif constant is first and constant.shape == numbers.shape:
        return
    vector = editor.add_constant(numbers, f"{constant.name}/first")
    kind = operator.kind if operator.kind in _COMMUTATIVE else "ADD"
    fused = {"fusedActivationFunction": operator.option("fusedActivationFunction", "NONE")}
    editor.replace(operator, replace(operator, kind=kind, inputs=(vector.name, other.name), options=fused))
