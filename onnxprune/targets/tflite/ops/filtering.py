"""Operators whose result has as many entries as the run finds."""

from __future__ import annotations

import numpy as np

from onnxprune.targets.tflite.build import Builder, UnsupportedError
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.carriers import WORDS, bitcast, carried, returned
from onnxprune.targets.tflite.ops.casting import cast_to
from onnxprune.targets.tflite.ops.formulas import Term
from onnxprune.targets.tflite.ops.selection import dimension, top
from onnxprune.targets.tflite.ops.table import TFLITE, NodeView

# A class of an image is seven operators; beyond this the file is no longer a sensible one.
_MAX_SUPPRESSIONS = 256


@TFLITE.register("NonZero")
def nonzero(node: NodeView, build: Builder) -> Tensor:
    """WHERE, transposed."""
    x = node.input(0)
    if x.rank == 0:
        raise UnsupportedError("WHERE has no scalars")
    return build.transposed(_places(build, cast_to(build, x, "BOOL")), (1, 0))


def _places(build: Builder, condition: Tensor) -> Tensor:
    """Indices of what is true, one a row: INT64."""
    return build.op("WHERE", [condition], shape=(-1, condition.rank), type_="INT64")


@TFLITE.register("Unique")
def unique(node: NodeView, build: Builder) -> list[Tensor | None]:
    """UNIQUE; TOPK_V2 sorts; indices, inverse and counts come from comparing all numbers with all unique ones."""
    x = node.input(0)
    if "axis" in node.node.attributes and x.rank != 1:
        raise UnsupportedError("UNIQUE compares numbers, not slices along an axis")
    x = build.reshaped(x, (-1 if -1 in x.shape else x.num_elements,))
    words = carried(build, x, WORDS, is_ordered=True)
    values, _ = build.ops("UNIQUE", [words], outputs=[((-1,), words.type), (x.shape, "INT32")], idxOutType="INT32")
    if node.integer("sorted", 1):
        values, _ = top(build, values, 0, dimension(build, values, 0), largest=False)
    outputs: list[Tensor | None] = [returned(build, values, x.type, is_ordered=True), None, None, None]
    if not any(node.is_read(position) for position in (1, 2, 3)):
        return outputs
    rows = Term(build, build.reshaped(values, (-1, 1)))
    is_same = rows.compared("EQUAL", Term(build, words)).tensor
    if node.is_read(1):
        outputs[1] = _first_true(build, is_same, 1, (-1,))
    if node.is_read(2):
        outputs[2] = _first_true(build, is_same, 0, x.shape)
    if node.is_read(3):
        along = build.constant(np.array([1], np.int32))
        counts = build.op("SUM", [build.cast(is_same, "INT32"), along], shape=(-1,), type_="INT32")
        outputs[3] = build.cast(counts, "INT64")
    return outputs


def _first_true(build: Builder, condition: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    place = build.constant(np.array(axis, np.int32))
    return build.op("ARG_MAX", [condition, place], shape=shape, type_="INT64", outputType="INT64")


@TFLITE.register("NonMaxSuppression")
def non_max_suppression(node: NodeView, build: Builder) -> Tensor:
    """NON_MAX_SUPPRESSION_V4 for each class of each image, a SLICE of what it found, and CONCATENATION."""
    boxes, scores = node.input(0), node.input(1)
    images, classes, candidates = scores.shape
    if images < 0 or classes < 0:
        raise UnsupportedError("NON_MAX_SUPPRESSION_V4 takes one class of one image: their numbers must be known")
    if images * classes > _MAX_SUPPRESSIONS:
        raise UnsupportedError(
            f"it has {images * classes} classes of images, and each would be a NON_MAX_SUPPRESSION_V4 of its own"
        )
    limits = _Limits(node, build)
    if node.integer("center_point_box"):
        boxes = _corners(build, boxes)
    found = []
    for image in range(images):
        of_image = _row(build, boxes, (image,), (candidates, 4))
        for class_ in range(classes):
            of_class = _row(build, scores, (image, class_), (candidates,))
            kept = limits.applied(of_image, of_class)
            # (n, 1) * (0, 0, 1) + (image, class, 0)
            column = Term(build, build.reshaped(kept, (-1, 1)))
            place = Term(build, build.constant(np.array([[image, class_, 0]], np.int32)))
            found.append((column * Term(build, build.constant(np.array([[0, 0, 1]], np.int32))) + place).tensor)
    if len(found) > 1:
        found = [build.op("CONCATENATION", found, shape=(-1, 3), type_="INT32", axis=0)]
    return build.cast(found[0], "INT64")


class _Limits:
    """How many boxes are kept, and above what; as scalars."""

    def __init__(self, node: NodeView, build: Builder) -> None:
        self.build = build
        candidates = node.input(1).shape[2]
        self.count = _scalar(build, node.optional(2), 0, np.int64)
        known = self.count.array()
        if known is not None:
            # The operator makes room for all of them; -1 candidates: as many as INT32 holds is too many.
            self.count = build.constant(np.minimum(known, candidates if candidates >= 0 else known).astype(np.int32))
        else:
            self.count = build.cast(self.count, "INT32")
        self.overlap = _next_above(build, _scalar(build, node.optional(3), 0.0, np.float32))
        self.score = _scalar(build, node.optional(4), float(np.finfo(np.float32).min), np.float32)

    def applied(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Indices of the boxes that are kept."""
        known = self.count.array()
        room = -1 if known is None else int(known)
        indices, count = self.build.ops(
            "NON_MAX_SUPPRESSION_V4",
            [boxes, scores, self.count, self.overlap, self.score],
            outputs=[((room,), "INT32"), ((), "INT32")],
        )
        start = self.build.constant(np.array([0], np.int32))
        return self.build.op("SLICE", [indices, start, self.build.reshaped(count, (1,))], shape=(-1,), type_="INT32")


def _next_above(build: Builder, overlap: Tensor) -> Tensor:
    """The next float32: the kernel drops a box that overlaps as much as this, and ONNX one that overlaps more."""
    bits = Term(build, bitcast(build, overlap, "INT32", ())) + 1
    return bitcast(build, bits.tensor, "FLOAT32", ())


def _scalar(build: Builder, tensor: Tensor | None, default: float, dtype: type[np.generic]) -> Tensor:
    return build.constant(np.array(default, dtype)) if tensor is None else build.reshaped(tensor, ())


def _row(build: Builder, tensor: Tensor, place: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """One entry of the first axes, by a SLICE where there are several."""
    if any(dim != 1 for dim in tensor.shape[: len(place)]):
        rest = tensor.shape[len(place) :]
        begin = build.constant(np.array((*place, *(0 for _ in rest)), np.int32))
        size = (*(1 for _ in place), *rest)
        tensor = build.op("SLICE", [tensor, begin, build.constant(np.array(size, np.int32))], shape=size)
    return build.reshaped(tensor, shape)


def _corners(build: Builder, boxes: Tensor) -> Tensor:
    """(x, y, width, height) -> (y1, x1, y2, x2)."""
    parts = build.ops(
        "SPLIT",
        [build.constant(np.array(2, np.int32)), boxes],
        outputs=[((*boxes.shape[:2], 1), boxes.type)] * 4,
        numSplits=4,
    )
    x, y, width, height = (Term(build, part) for part in parts)
    half_width, half_height = width * 0.5, height * 0.5
    corners = [y - half_height, x - half_width, y + half_height, x + half_width]
    return build.op("CONCATENATION", [corner.tensor for corner in corners], shape=boxes.shape, axis=2)
