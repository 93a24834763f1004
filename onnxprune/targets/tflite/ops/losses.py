"""Losses of classification: the log-probability of the labelled class, gathered in a batch of rows."""

from __future__ import annotations

import numpy as np

from onnxprune.targets.tflite.build import Builder
from onnxprune.targets.tflite.graph import Tensor
from onnxprune.targets.tflite.ops.normalization import log_softmax_over
from onnxprune.targets.tflite.ops.sizes import reshaped_to, size_of
from onnxprune.targets.tflite.ops.table import TFLITE, Emitted, NodeView
from onnxprune.targets.tflite.ops.windows import channels_last


@TFLITE.register("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(node: NodeView, build: Builder) -> Emitted:
    """LOG_SOFTMAX over the classes and the loss of its result; both are outputs."""
    log_probability = log_softmax_over(build, node.input(0), 1)
    return [_loss(node, build, log_probability), log_probability][: node.num_outputs]


@TFLITE.register("NegativeLogLikelihoodLoss")
def negative_log_likelihood_loss(node: NodeView, build: Builder) -> Tensor:
    """The loss of log-probabilities that are given."""
    return _loss(node, build, node.input(0))


def _loss(node: NodeView, build: Builder, log_probability: Tensor) -> Tensor:
    """-log_probability (N, C, space) at the labels (N, space), weighted by class, and reduced."""
    labels = build.cast(node.input(1), "INT32")
    places = [size_of(labels, axis) for axis in range(labels.rank)]
    count = -1 if not labels.is_static else labels.num_elements
    rows = build.transposed(log_probability, channels_last(log_probability.rank))
    rows, flat = build.reshaped(rows, (count, rows.shape[-1])), build.reshaped(labels, (count,))
    ignored = None
    if "ignore_index" in node.node.attributes:
        ignored = build.binary("EQUAL", flat, build.constant([node.integer("ignore_index")]), type_="BOOL")
        # Any class will do, so long as it is one.
        flat = build.op("SELECT_V2", [ignored, build.constant([0]), flat], shape=flat.shape, type_="INT32")
    picked = build.op("GATHER", [rows, flat], shape=flat.shape, type_=rows.type, axis=1, batchDims=1)
    loss = _without(build, build.op("NEG", [picked]), ignored)
    weights = None
    if node.has(2):
        weights = build.op("GATHER", [node.input(2), flat], shape=flat.shape, type_=loss.type, axis=0)
        weights = _without(build, weights, ignored)
        loss = build.binary("MUL", loss, weights)
    elif ignored is not None:
        weights = _without(build, build.constant([1.0]), ignored)
    reduction = node.text("reduction", "mean")
    if reduction == "none":
        return reshaped_to(build, loss, places)
    if reduction == "mean" and weights is not None:
        return build.binary("DIV", _reduced(build, "SUM", loss), _reduced(build, "SUM", weights))
    return _reduced(build, "MEAN" if reduction == "mean" else "SUM", loss)


def _without(build: Builder, numbers: Tensor, ignored: Tensor | None) -> Tensor:
    """0 where the label is ignored."""
    if ignored is None:
        return numbers
    zero = build.constant(np.zeros(1, np.float32))
    return build.op("SELECT_V2", [ignored, zero, numbers], shape=ignored.shape, type_=numbers.type)


def _reduced(build: Builder, kind: str, numbers: Tensor) -> Tensor:
    """A scalar."""
    return build.op(kind, [numbers, build.constant([0])], shape=(), type_=numbers.type)
